// Loops over every document and every sample, where NumPy would need one pass per dataset or a 64-bit prefix sum of
// the whole corpus. Built into megascratch.data._sample_index; the caller allocates, these functions fill.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

namespace {

// Fill `sample_index` [n_samples + 1, 2] with (position in document_index, token offset in that document) of the
// tokens 0, s, 2s, ... of the stream that concatenates the documents in the order of `document_index`.
//
// Sample k reads tokens k*s to (k+1)*s inclusive, so neighbours share one token: the last label of one is the first
// input of the next. The first row is (0, 0) even when leading documents are empty, as in Megatron.
template <typename T>
void fill_sample_index(const Array<std::int32_t>& lengths, const Array<std::int32_t>& document_index,
                       std::int64_t seq_length, Array<T>& sample_index) {
    if (sample_index.ndim() != 2 || sample_index.shape(0) < 1 || sample_index.shape(1) != 2)
        throw std::invalid_argument("sample_index must be [n_samples + 1, 2]");
    if (seq_length < 1) throw std::invalid_argument("seq_length must be positive");
    const std::int32_t* length = lengths.data();
    const std::int32_t* document = document_index.data();
    T* row = sample_index.mutable_data();
    const std::int64_t n_lengths = lengths.size(), n_positions = document_index.size();
    const std::int64_t n_rows = sample_index.shape(0);

    bool exhausted = false;
    {
        py::gil_scoped_release released;
        std::int64_t position = -1;  // in document_index
        std::int64_t begin = 0;      // stream offset of the first token of that document
        std::int64_t end = 0;        // stream offset behind its last token
        row[0] = row[1] = 0;
        for (std::int64_t k = 1; k < n_rows && !exhausted; ++k) {
            const std::int64_t token = k * seq_length;
            while (end <= token) {
                if (++position >= n_positions || document[position] < 0 || document[position] >= n_lengths) {
                    exhausted = true;
                    break;
                }
                begin = end;
                end += length[document[position]];
            }
            row[2 * k] = static_cast<T>(position);
            row[2 * k + 1] = static_cast<T>(token - begin);
        }
    }
    if (exhausted) throw std::invalid_argument("document_index holds too few tokens or an unknown document");
}

// Fill `dataset_index` and `sample_index` [size]: which dataset each blended sample comes from, and which of its
// samples it is. Each step serves the dataset that lags furthest behind its share of the samples so far (the first of
// equals); a dataset that has given `limits[d]` samples is passed over.
void fill_blend(const Array<double>& weights, const Array<std::int64_t>& limits, Array<std::int16_t>& dataset_index,
                Array<std::int64_t>& sample_index) {
    const std::int64_t n_datasets = weights.size(), size = dataset_index.size();
    if (n_datasets < 1 || n_datasets > std::numeric_limits<std::int16_t>::max())
        throw std::invalid_argument("a blend takes 1 to 32767 datasets");
    if (limits.size() != n_datasets || sample_index.size() != size)
        throw std::invalid_argument("weights and limits, dataset_index and sample_index must match in size");
    const double* weight = weights.data();
    const std::int64_t* limit = limits.data();
    std::int16_t* dataset = dataset_index.mutable_data();
    std::int64_t* sample = sample_index.mutable_data();

    bool exhausted = false;
    {
        py::gil_scoped_release released;
        std::vector<std::int64_t> given(n_datasets, 0);
        for (std::int64_t k = 0; k < size; ++k) {
            // The first two samples both weigh the shares at 1: with 0, every lag of the first would tie at zero.
            const double so_far = std::max(static_cast<double>(k), 1.0);
            std::int64_t most_behind = -1;
            double largest_lag = std::numeric_limits<double>::lowest();
            for (std::int64_t d = 0; d < n_datasets; ++d) {
                const double lag = weight[d] * so_far - static_cast<double>(given[d]);
                if (given[d] < limit[d] && lag > largest_lag) {
                    largest_lag = lag;
                    most_behind = d;
                }
            }
            if (most_behind < 0) {
                exhausted = true;
                break;
            }
            dataset[k] = static_cast<std::int16_t>(most_behind);
            sample[k] = given[most_behind]++;
        }
    }
    if (exhausted) throw std::invalid_argument("the limits add up to less than the size of the blend");
}

}  // namespace

PYBIND11_MODULE(_sample_index, m) {
    m.doc() = "Sample and blending indices with Megatron's semantics.";
    const auto exact = [](const char* name) { return py::arg(name).noconvert(); };  // never fill a converted copy
    m.def("fill_sample_index", &fill_sample_index<std::int32_t>, exact("lengths"), exact("document_index"),
          py::arg("seq_length"), exact("sample_index"));
    m.def("fill_sample_index", &fill_sample_index<std::int64_t>, exact("lengths"), exact("document_index"),
          py::arg("seq_length"), exact("sample_index"));
    m.def("fill_blend", &fill_blend, exact("weights"), exact("limits"), exact("dataset_index"),
          exact("sample_index"));
}
