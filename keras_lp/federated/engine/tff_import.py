"""Imports TensorFlow Federated 0.87 with current versions of TensorFlow and Keras."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from typing import Any

from keras_lp.federated.engine.installation import is_installed


@functools.cache
def import_tff() -> Any:
    """Imports the module once and returns it. The caller must hold a lock."""
    # Releases after 0.87 support Keras 3.
    if importlib.metadata.version("tensorflow-federated").startswith("0.87"):
        _install_placeholders()
    return importlib.import_module("tensorflow_federated")


def _install_placeholders() -> None:
    """Installs empty modules for imports that TFF 0.87 does not need at runtime."""

    def unavailable(*_: Any, **__: Any) -> None:
        raise ImportError("This part of TFF needs packages that are not installed.")

    _placeholder("tensorflow_federated.python.core.environments.jax", computation=unavailable)
    _placeholder(
        "tensorflow_federated.python.learning.programs.vizier_program_logic",
        train_model_with_vizier=unavailable,
    )
    if not is_installed("distutils"):  # Python 3.12 and later

        class LooseVersion:
            def __init__(self, version: str) -> None:
                self.version = tuple(int(part) for part in version.split(".")[:2])

            def __lt__(self, other: LooseVersion) -> bool:
                return self.version < other.version

        version = _placeholder("distutils.version", LooseVersion=LooseVersion)
        _placeholder("distutils", version=version, __path__=[])
    if not is_installed("tensorflow_probability"):
        _placeholder("tensorflow_probability")
    _import_dp_queries()
    # Its `__init__` imports tf_keras, but TFF uses only one subpackage.
    spec = importlib.util.find_spec("tensorflow_model_optimization")
    folders = None if spec is None else spec.submodule_search_locations
    _placeholder(
        "tensorflow_model_optimization",
        __path__=list(folders or ()),
        __spec__=spec,
    )


def _import_dp_queries() -> None:
    """Imports only the queries of tensorflow-privacy; the rest needs TensorFlow 1 estimators."""
    vars(sys)["skip_tf_privacy_import"] = True  # a switch of the package
    privacy = importlib.import_module("tensorflow_privacy")
    del vars(sys)["skip_tf_privacy_import"]
    queries = (
        "dp_query",
        "gaussian_query",
        "no_privacy_query",
        "normalized_query",
        "quantile_estimator_query",
        "quantile_adaptive_clip_sum_query",
        "quantile_adaptive_clip_tree_query",
        "restart_query",
        "tree_aggregation_query",
        "tree_range_query",
        "distributed_discrete_gaussian_query",
        "distributed_skellam_query",
    )
    for name in queries:
        module = importlib.import_module(f"tensorflow_privacy.privacy.dp_query.{name}")
        setattr(privacy, name, module)
        for attribute, value in vars(module).items():
            if isinstance(value, type) and not attribute.startswith("_"):
                setattr(privacy, attribute, value)


def _placeholder(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # `find_spec` needs one
    vars(module).update(attributes)
    sys.modules[name] = module
    return module
