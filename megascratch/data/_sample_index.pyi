from numpy import float64, int16, int32, int64
from numpy.typing import NDArray

def fill_sample_index(
    lengths: NDArray[int32],
    document_index: NDArray[int32],
    seq_length: int,
    sample_index: NDArray[int32] | NDArray[int64],
) -> None: ...
def fill_blend(
    weights: NDArray[float64], limits: NDArray[int64], dataset_index: NDArray[int16], sample_index: NDArray[int64]
) -> None: ...
