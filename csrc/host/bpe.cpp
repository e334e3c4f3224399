// Python bindings of the BPE trainer and encoder: megascratch.tokenizer._bpe.
//
// Text crosses the border in bulk, as one UTF-8 buffer and the end offsets of its pre-tokens; the GIL is released for
// all the work in between. Offsets are checked here once, so that a wrong caller gets an exception and not a bad read.

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bpe_encode.h"
#include "bpe_train.h"
#include "sentencepiece.h"

namespace py = pybind11;
using namespace megascratch::bpe;

namespace {

using Offsets = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Ids = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

void check_offsets(const Offsets& ends, int64_t last, bool strictly, const char* what) {
    if (ends.ndim() != 1) throw std::invalid_argument(std::string(what) + " must be one-dimensional");
    int64_t previous = 0;
    for (py::ssize_t i = 0; i < ends.size(); ++i) {
        const int64_t end = ends.data()[i];
        if (end < previous || (strictly && end == previous))
            throw std::invalid_argument(std::string(what) + " must increase");
        previous = end;
    }
    if (previous != last) throw std::invalid_argument(std::string(what) + " must reach the end exactly");
}

template <class T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
    auto* owner = new std::vector<T>(std::move(values));
    py::capsule free_owner(owner, [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(py::ssize_t(owner->size()), owner->data(), free_owner);
}

void add(PieceCounter& counter, std::string_view text, const Offsets& ends) {
    check_offsets(ends, int64_t(text.size()), true, "ends");
    const py::gil_scoped_release release;
    counter.add(text.data(), ends.data(), size_t(ends.size()));
}

py::tuple train(const PieceCounter& counter, const std::string& byte_order, size_t n_tokens,
                const std::function<void(size_t)>& progress) {
    if (byte_order.size() != 256) throw std::invalid_argument("byte_order must hold 256 bytes");
    Trained trained;
    {
        const py::gil_scoped_release release;
        trained = Trainer(counter, byte_order).train(n_tokens, [&](size_t n) {
            const py::gil_scoped_acquire acquire;  // Ctrl-C arrives here, as the callback's exception
            progress(n);
        });
    }
    py::list tokens;
    for (const std::string& token : trained.tokens) tokens.append(py::bytes(token));
    py::array_t<int32_t> merges({py::ssize_t(trained.merges.size()), py::ssize_t(3)});
    static_assert(sizeof(Merge) == 3 * sizeof(int32_t));
    std::copy_n(reinterpret_cast<const int32_t*>(trained.merges.data()), 3 * trained.merges.size(),
                merges.mutable_data());
    return py::make_tuple(tokens, merges);
}

std::unique_ptr<Encoder> make_encoder(const std::vector<py::bytes>& tokens, const Ids& merges, bool whole_first) {
    if (merges.ndim() != 2 || merges.shape(1) != 4) throw std::invalid_argument("merges must be [m, 4]");
    const std::vector<std::string_view> views(tokens.begin(), tokens.end());
    std::vector<uint64_t> pairs;
    std::vector<Rule> rules;
    const auto row = merges.unchecked<2>();
    for (py::ssize_t i = 0; i < merges.shape(0); ++i) {
        for (py::ssize_t column = 0; column < 3; ++column)
            if (row(i, column) < 0 || size_t(row(i, column)) >= tokens.size())
                throw std::invalid_argument("a merge names an id that is not in the vocabulary");
        pairs.push_back(pair_key(row(i, 0), row(i, 1)));
        rules.push_back({row(i, 3), row(i, 2)});
    }
    return std::make_unique<Encoder>(views, pairs, rules, whole_first);
}

py::tuple encode(const Encoder& encoder, std::string_view text, const Offsets& ends, const Offsets& document_ends,
                 size_t threads) {
    check_offsets(ends, int64_t(text.size()), true, "ends");
    check_offsets(document_ends, ends.size(), false, "document_ends");
    std::vector<int32_t> ids;
    std::vector<int64_t> id_ends;
    {
        const py::gil_scoped_release release;
        ids = encoder.encode(text.data(), ends.data(), size_t(ends.size()), document_ends.data(),
                             size_t(document_ends.size()), threads, id_ends);
    }
    return py::make_tuple(to_numpy(std::move(ids)), to_numpy(std::move(id_ends)));
}

using megascratch::sentencepiece::CharacterEncoder;
using megascratch::sentencepiece::Merging;

std::unique_ptr<CharacterEncoder> make_character_encoder(const std::vector<py::bytes>& tokens, const Ids& merges,
                                                         const std::vector<int32_t>& byte_ids,
                                                         const std::vector<int32_t>& frozen, bool cut_spaces) {
    if (merges.ndim() != 2 || merges.shape(1) != 4) throw std::invalid_argument("merges must be [m, 4]");
    if (byte_ids.size() != 256) throw std::invalid_argument("byte_ids must hold 256 ids");
    const std::vector<std::string_view> views(tokens.begin(), tokens.end());
    const auto check = [&](int32_t id) {
        if (id < 0 || size_t(id) >= views.size() || views[size_t(id)].empty())
            throw std::invalid_argument("an id that is to be merged or kept whole has no text");
    };
    std::vector<uint64_t> pairs;
    std::vector<Merging> rules;
    const auto row = merges.unchecked<2>();
    for (py::ssize_t i = 0; i < merges.shape(0); ++i) {
        for (py::ssize_t column = 0; column < 3; ++column) check(row(i, column));
        pairs.push_back(pair_key(row(i, 0), row(i, 1)));
        rules.push_back({row(i, 3), row(i, 2)});
    }
    for (const int32_t id : frozen) check(id);
    return std::make_unique<CharacterEncoder>(views, byte_ids, pairs, rules, frozen, cut_spaces);
}

py::tuple encode_characters(const CharacterEncoder& encoder, std::string_view text, const Offsets& ends,
                            const Offsets& document_ends, size_t threads) {
    check_offsets(ends, int64_t(text.size()), true, "ends");
    check_offsets(document_ends, ends.size(), false, "document_ends");
    std::vector<int32_t> ids;
    std::vector<int64_t> id_ends;
    {
        const py::gil_scoped_release release;
        ids = encoder.encode(text.data(), ends.data(), document_ends.data(), size_t(document_ends.size()), threads,
                             id_ends);
    }
    return py::make_tuple(to_numpy(std::move(ids)), to_numpy(std::move(id_ends)));
}

}  // namespace

PYBIND11_MODULE(_bpe, m) {
    m.doc() = "Byte-level BPE: trainer and encoder.";
    py::class_<PieceCounter>(m, "PieceCounter", "Counts distinct pre-tokens and trains on the counts.")
        .def(py::init<>())
        .def("add", &add, py::arg("text"), py::arg("ends"))
        .def_property_readonly("n_pieces", &PieceCounter::n_pieces)
        .def_property_readonly("n_distinct", [](const PieceCounter& c) { return c.pieces().size(); })
        .def("train", &train, py::arg("byte_order"), py::arg("n_tokens"), py::arg("progress"));
    py::class_<Encoder>(m, "Encoder", "Encodes pre-tokens by ranked merges.")
        .def(py::init(&make_encoder), py::arg("tokens"), py::arg("merges"), py::arg("whole_first"))
        .def("encode", &encode, py::arg("text"), py::arg("ends"), py::arg("document_ends"), py::arg("threads"));
    py::class_<CharacterEncoder>(m, "CharacterEncoder", "Encodes text as SentencePiece's BPE with byte fallback does.")
        .def(py::init(&make_character_encoder), py::arg("tokens"), py::arg("merges"), py::arg("byte_ids"),
             py::arg("frozen"), py::arg("cut_spaces"))
        .def("encode", &encode_characters, py::arg("text"), py::arg("ends"), py::arg("document_ends"),
             py::arg("threads"));
}
