"""The LiteRT runtime with one thread, which runs exported files before they are written."""

from __future__ import annotations

from typing import Any


def load_interpreter(content: bytes, keep_all: bool = False) -> Any:
    """Loads a file.

    Args:
        content: the bytes of the file.
        keep_all: whether all tensors can be read after a run, which needs more memory and time.
            Defaults to False.

    Raises:
        ImportError: `ai-edge-litert` is not installed.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError as error:
        raise ImportError(
            "The export runs the file before it is written, which needs the LiteRT runtime. "
            "Install it: pip install 'keras_lp[phone]'."
        ) from error
    kind = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if keep_all else OpResolverType.AUTO
    return Interpreter(
        model_content=content,
        num_threads=1,
        experimental_preserve_all_tensors=keep_all,
        experimental_op_resolver_type=kind,
    )
