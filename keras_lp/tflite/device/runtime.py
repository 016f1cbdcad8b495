"""The LiteRT runtime, on one thread: exported files are run before they are written."""

from __future__ import annotations

from typing import Any


def load_interpreter(content: bytes, keep_all: bool = False) -> Any:
    """Loads a file.

    Args:
        content: the file's bytes.
        keep_all: whether every tensor can be read after a run, which costs memory and time.
            Defaults to False.

    Raises:
        ImportError: `ai-edge-litert` is not installed.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError as error:
        raise ImportError(
            "An exported file is run before it is written, which needs the LiteRT runtime. "
            "Install it: pip install 'keras_lp[phone]'."
        ) from error
    kind = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if keep_all else OpResolverType.AUTO
    return Interpreter(
        model_content=content,
        num_threads=1,
        experimental_preserve_all_tensors=keep_all,
        experimental_op_resolver_type=kind,
    )
