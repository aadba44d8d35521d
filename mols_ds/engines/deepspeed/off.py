"""A DeepSpeed engine with MoLS off: a stock engine whose checkpoints keep a loaded MoLS state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mols_ds.core.off import OffHandle
from mols_ds.core.replaced_methods import ReplacedMethods
from mols_ds.engines.deepspeed.compat import Engine, load_options
from mols_ds.engines.deepspeed.loads import KEY, mark_loaded


class EngineOff(OffHandle):
    """Replace `save_checkpoint` and `load_checkpoint` of one engine instance until `detach()`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._methods = ReplacedMethods(engine)
        self._save = self._methods.set("save_checkpoint", self._save_with_state)
        self._load = self._methods.set("load_checkpoint", self._load_state)

    def detach(self) -> None:
        """Restore the engine's own methods and drop the kept state. A second call does nothing."""
        self._methods.undo()
        if getattr(self.engine, "mols", None) is self:
            del self.engine.mols

    def _save_with_state(
        self, save_dir: Any, tag: Any = None, client_state: Mapping[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        kept = {} if self.kept is None else {KEY: self.kept}
        return self._save(save_dir, tag, {**kept, **(client_state or {})}, *args, **kwargs)

    def _load_state(self, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        path, loaded = self._load(load_dir, tag, *args, **kwargs)
        mark_loaded(self.engine)  # `keep` warns
        if path is None or load_options(load_dir, tag, *args, **kwargs)["load_module_only"]:
            return path, loaded
        client_state = dict(loaded or {})
        saved = client_state.pop(KEY, None)
        if isinstance(saved, Mapping):  # the accumulators are in the loaded checkpoint's files
            saved = {**saved, "side": None}
        self.keep(saved, int(self.engine.global_steps))
        return path, client_state
