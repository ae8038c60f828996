"""Published names of the weights of a transformers model, by transformers' own record.

transformers lists, for each family, what becomes of the names in published files when they are
loaded. The reverse of that list gives the published names; `save_pretrained` uses it too.
"""

import transformers
from packaging.version import Version
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, WeightTransform

from mm_piece.errors import ModelError

_OLDEST = "5.20"  # versions before list fewer families, and would give other names


class PublishedNames:
    """The function from the live names of one model to its published names."""

    def __init__(self, model: nn.Module) -> None:
        """Read the record of a transformers model.

        Raises ModelError for a weight that is not one tensor of the published files, and for a
        version of transformers whose record is too old.
        """
        self._family = model.config.model_type  # type: ignore[union-attr] - transformers' models
        if Version(transformers.__version__) < Version(_OLDEST):
            raise ModelError(
                f"model family {self._family!r} needs transformers {_OLDEST} or newer, for the "
                f"published names of its weights; this is {transformers.__version__}"
            )

        # without legacy names: several old names may stand for one of today
        steps = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
        reverse = [step.reverse_transform() for step in reversed(steps)]
        self._converters: list[WeightConverter] = []
        self._renamings: list[WeightTransform] = []
        for step in reverse:
            if isinstance(step, WeightConverter):
                self._converters.append(step)
            else:
                self._renamings.append(step)

        # in the model's order: some steps depend on the names before
        self._known: dict[str, str] = {}
        for live, _ in model.named_parameters(remove_duplicate=False):
            self._known[live] = self._translate(live)

    def __call__(self, live: str) -> str:
        """Return the published name of a live one; of any other name, what would become of it."""
        if live in self._known:
            return self._known[live]
        return self._translate(live)

    def _translate(self, live: str) -> str:
        name = live
        # at most one of them applies, before the renamings, as when transformers saves
        for step in self._converters:
            name, pattern = step.rename_source_key(name)
            if pattern is not None:
                self._require_one_tensor(live, step)
                break

        for step in self._renamings:
            name, _ = step.rename_source_key(name)
        return name

    def _require_one_tensor(self, live: str, step: WeightConverter) -> None:
        """Raise ModelError unless a conversion does no more than to swap dimensions."""
        targets = step.target_patterns
        is_one_name = len(targets) == 1 and "*" not in targets[0]
        swaps_only = all(isinstance(operation, Transpose) for operation in step.operations)
        if not is_one_name or not swaps_only:
            raise ModelError(
                f"model family {self._family!r}: its weight {live} is not one tensor of the "
                f"published files but made of {', '.join(targets)}; such families cannot be "
                "trained yet"
            )
