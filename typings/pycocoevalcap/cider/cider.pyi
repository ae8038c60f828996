from collections.abc import Iterable, Mapping, Sequence

class Cider:
    def compute_score(
        self,
        gts: Mapping[int, Sequence[str]],
        res: Mapping[int, Sequence[str]],
    ) -> tuple[float, Iterable[float]]: ...
