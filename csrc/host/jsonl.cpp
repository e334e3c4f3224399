// Python bindings of the path from JSON Lines to documents of token ids: megascratch.data._jsonl.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>

#include "jsonl.h"
#include "python_bytes.h"

namespace py = pybind11;
using namespace megascratch::jsonl;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
Array<T> to_numpy(const std::vector<T>& values) {
    return Array<T>(py::ssize_t(values.size()), values.data());
}

Array<uint8_t> to_numpy(Texts& texts) {
    auto* const utf8 = reinterpret_cast<uint8_t*>(texts.release());
    return Array<uint8_t>(py::ssize_t(texts.size()), utf8, py::capsule(utf8, [](void* p) { std::free(p); }));
}

bool blank(std::string_view line) { return line.find_first_not_of(" \t\n\r\v\f") == line.npos; }

// Ask Python for the strings of a line; None means that the line is bad and has been noted.
void ask(const py::function& unusual, int64_t number, std::string_view line, std::vector<Texts>& texts) {
    const py::gil_scoped_acquire acquired;
    const py::object answer = unusual(number, py::bytes(line.data(), line.size()));
    if (answer.is_none()) return;
    const auto values = answer.cast<std::vector<py::bytes>>();
    if (values.size() != texts.size()) throw std::invalid_argument("unusual must return one value for each key");
    for (size_t key = 0; key < texts.size(); ++key) texts[key].append(std::string_view(values[key]));
}

// The strings of each key in (whole lines of) data: a list of (utf8, ends) in the keys' order, and the number of lines.
py::tuple extract(const py::buffer& data, const std::vector<std::string>& keys, const py::function& unusual) {
    const megascratch::Bytes bytes(data);
    const char *line = bytes.data(), *const end = line + bytes.size();
    std::vector<Texts> texts;
    // Strings beside the text are few as a rule: only the first key's buffer is made for the worst case at once.
    for (size_t key = 0; key < keys.size(); ++key) texts.emplace_back(key == 0 ? size_t(bytes.size()) : 0);
    int64_t n_lines = 0;
    {
        const py::gil_scoped_release released;
        LineParser parser(keys, end);
        for (; line != end; ++n_lines) {
            if (const char* const next = parser.parse(line, texts)) {
                line = next;
                continue;
            }
            const char* const line_end = std::find(line, end, '\n');
            const std::string_view unusual_line(line, size_t(line_end - line));
            if (!blank(unusual_line)) ask(unusual, n_lines, unusual_line, texts);
            line = line_end == end ? end : line_end + 1;
        }
    }
    py::list by_key;
    for (Texts& one : texts) by_key.append(py::make_tuple(to_numpy(one), to_numpy(one.ends())));
    return py::make_tuple(by_key, n_lines);
}

// Copy documents into tokens of the dataset's type, each that is not empty with the end-of-document id behind it.
template <class Id, class Token>
py::tuple pack(const Array<Id>& ids, const Array<int64_t>& ends, std::optional<Token> eod, const Array<Token>&) {
    const int64_t n_documents = ends.size(), n_ids = ids.size();
    const Id* id = ids.data();
    const int64_t* end = ends.data();
    Array<int64_t> lengths(n_documents);
    int64_t* length = lengths.mutable_data();
    int64_t n_tokens = 0, begin = 0;
    for (int64_t d = 0; d < n_documents; begin = end[d++]) {
        if (end[d] < begin || end[d] > n_ids) throw std::invalid_argument("ends must rise to the number of ids");
        length[d] = end[d] - begin + (eod && end[d] > begin ? 1 : 0);
        n_tokens += length[d];
    }
    if (begin != n_ids) throw std::invalid_argument("ends must rise to the number of ids");
    Array<Token> tokens(n_tokens);
    Token* token = tokens.mutable_data();
    Id highest = 0;
    {
        const py::gil_scoped_release released;
        for (int64_t i = 0; i < n_ids; ++i) highest = std::max(highest, id[i]);
        begin = 0;
        for (int64_t d = 0; d < n_documents; begin = end[d++]) {
            token = std::transform(id + begin, id + end[d], token, [](Id one) { return Token(one); });
            if (eod && end[d] > begin) *token++ = *eod;
        }
    }
    if (uint64_t(highest) > uint64_t(std::numeric_limits<Token>::max()))
        throw std::out_of_range("a token id does not fit the dtype");
    return py::make_tuple(tokens, lengths);
}

template <class Id, class Token>
void define_pack(py::module_& m) {
    const auto exact = [](const char* name) { return py::arg(name).noconvert(); };  // never pick by converting
    m.def("pack", &pack<Id, Token>, exact("ids"), py::arg("ends"), py::arg("eod"), exact("like"));
}

}  // namespace

PYBIND11_MODULE(_jsonl, m) {
    m.doc() = "JSON Lines to texts, and ids to documents.";
    m.def("extract", &extract, py::arg("data"), py::arg("keys"), py::arg("unusual"));
    define_pack<uint16_t, uint16_t>(m);
    define_pack<uint32_t, uint16_t>(m);
    define_pack<uint16_t, int32_t>(m);
    define_pack<uint32_t, int32_t>(m);
}
