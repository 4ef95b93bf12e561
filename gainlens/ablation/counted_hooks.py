"""``AblationHooks``: the hooks of a cut, with a count of how often each fired."""

from __future__ import annotations

from gainlens.errors import SilentSiteError
from gainlens.model.hooks import Hook


class AblationHooks(list[Hook]):
    """``(name, fn)`` hooks for ``run_with_hooks`` that count how often they fired.

    Attributes:
        fires: calls per layer so far.
    """

    def __init__(self, n_layers: int) -> None:
        super().__init__()
        self.fires = [0] * n_layers

    def check_fired(self) -> None:
        """Raise unless every layer was cut the same number of times.

        Raises:
            SilentSiteError: a hook did not fire; the message names its layer.
        """
        silent = [layer for layer, n in enumerate(self.fires) if n < max(self.fires) or n == 0]
        if silent:
            raise SilentSiteError(
                f"the ablation hooks of layer(s) {silent} did not fire, so the model was not cut "
                "there; was a full forward pass run, without reset_hooks?"
            )
