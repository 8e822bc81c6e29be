// The Python face of the compiled core: checks shapes, releases the interpreter lock, picks the instruction set.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "product.hpp"
#include "rans.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

enum class Isa { generic, avx2, avx512 };

bool runs(Isa isa) {
#if defined(TENPAK_X86)
    __builtin_cpu_init();
    switch (isa) {
        case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Isa::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        default: return true;
    }
#else
    return isa == Isa::generic;
#endif
}

constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

Isa best() { return runs(Isa::avx512) ? Isa::avx512 : runs(Isa::avx2) ? Isa::avx2 : Isa::generic; }

Isa chosen = best();

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (int isa = 0; isa < 3; ++isa)
        if (runs(static_cast<Isa>(isa))) names.emplace_back(kNames[isa]);
    return names;
}

std::string use(const std::string& name) {
    const std::string before = kNames[static_cast<int>(chosen)];
    for (int isa = 0; isa < 3; ++isa)
        if (name == kNames[isa] && runs(static_cast<Isa>(isa))) {
            chosen = static_cast<Isa>(isa);
            return before;
        }
    throw std::invalid_argument("this machine has no instruction set '" + name + "'");
}

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

template <typename T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<std::int64_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Rates = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void quantize(Matrix<const float> weight, Matrix<float> target, Matrix<float> error, Matrix<std::int32_t> levels,
              Matrix<const float> feedback, Vector<const float> row_step, Vector<const float> column_step,
              Rates rates, Vector<const std::int32_t> row_class, Vector<const std::int32_t> column_class,
              unsigned states, std::size_t segment) {
    const std::size_t columns = weight.shape(0), rows = weight.shape(1);
    const auto same = [&](const auto& other) { return other.shape(0) == columns && other.shape(1) == rows; };
    require(same(target) && same(error) && same(levels), "target, error and levels have the shape of the weight");
    require(feedback.shape(0) == columns && feedback.shape(1) == columns, "the feedback is [columns, columns]");
    require(row_step.shape(0) == rows && column_step.shape(0) == columns, "one step per row and per column");
    require(row_class.shape(0) == rows && column_class.shape(0) == columns, "one class per row and per column");
    require(states == 1 || tenpak::machine_of(states) != nullptr, "states is 1, 4, 8, 16, 32, 64, 128 or 256");
    require(segment > 0, "a segment has at least one row");
    require(rates.shape(0) == 0 || (rates.shape(1) == 2 && rates.shape(2) > 0), "rates are [classes, 2, symbols]");
    const tenpak::Block block{rows,
                              columns,
                              weight.data(),
                              target.data(),
                              error.data(),
                              levels.data(),
                              feedback.data(),
                              row_step.data(),
                              column_step.data(),
                              rates.shape(0) == 0 ? nullptr : rates.data(),
                              row_class.data(),
                              column_class.data(),
                              rates.shape(0),
                              rates.shape(2),
                              states,
                              segment};
    nb::gil_scoped_release unlocked;
    switch (chosen) {
#if defined(TENPAK_X86)
        case Isa::avx512: return tenpak::avx512::quantize(block);
        case Isa::avx2: return tenpak::avx2::quantize(block);
#endif
        default: return tenpak::generic::quantize(block);
    }
}

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

tenpak::Layout layout_of(Vector<const std::int32_t> row_class, Vector<const std::int32_t> column_class, Bytes shape,
                         unsigned states, std::size_t lanes, std::size_t segment) {
    require(states == 1 || tenpak::machine_of(states) != nullptr, "states is 1, 4, 8, 16, 32, 64, 128 or 256");
    require(lanes > 0 && segment > 0, "there is at least one lane, and a segment has at least one row");
    require(shape.shape(0) == 4, "a shape has four bytes");
    const std::uint8_t* s = shape.data();
    return {row_class.shape(0), column_class.shape(0), lanes,
            segment,            states,                row_class.data(),
            column_class.data(), {s[0], s[1], s[2], s[3]}};
}

nb::bytes rans_encode(Matrix<const std::int32_t> levels, Vector<const std::int32_t> row_class,
                      Vector<const std::int32_t> column_class, Bytes shape, unsigned states, std::size_t lanes,
                      std::size_t segment) {
    const tenpak::Layout layout = layout_of(row_class, column_class, shape, states, lanes, segment);
    require(levels.shape(0) == layout.rows && levels.shape(1) == layout.columns, "one class per row and per column");
    std::vector<std::uint16_t> words;
    {
        nb::gil_scoped_release unlocked;
        words = tenpak::rans_encode(layout, levels.data());
    }
    return nb::bytes(words.data(), words.size() * sizeof(std::uint16_t));  // little-endian, as the machine is
}

bool (*decoder())(const tenpak::Decoding&) {
    switch (chosen) {
#if defined(TENPAK_X86)
        case Isa::avx512: return &tenpak::avx512::decode;
        case Isa::avx2: return &tenpak::avx2::decode;
#endif
        default: return &tenpak::generic::decode;
    }
}

bool rans_decode(Vector<const std::uint16_t> words, Matrix<std::int32_t> levels, Vector<const std::int32_t> row_class,
                 Vector<const std::int32_t> column_class, Bytes shape, unsigned states, std::size_t lanes,
                 std::size_t segment) {
    const tenpak::Layout layout = layout_of(row_class, column_class, shape, states, lanes, segment);
    require(levels.shape(0) == layout.rows && levels.shape(1) == layout.columns, "one class per row and per column");
    nb::gil_scoped_release unlocked;
    return tenpak::rans_decode(layout, words.data(), words.shape(0), levels.data(), decoder());
}

using Frequencies = nb::ndarray<const std::uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

tenpak::Grid grid_of(std::size_t rows, std::size_t columns, Vector<const std::int32_t> row_class,
                     Frequencies frequencies, std::size_t lanes) {
    const std::size_t classes = frequencies.shape(0);
    require(row_class.shape(0) == rows, "one class per row");
    require(lanes > 0 && classes > 0, "there is at least one lane and one class");
    require(frequencies.shape(1) == 256, "frequencies are [classes, 256]");
    for (std::size_t cls = 0; cls < classes; ++cls) {
        const std::uint16_t* table = frequencies.data() + cls * 256;
        require(std::accumulate(table, table + 256, 0u) == 4096 && *std::max_element(table, table + 256) < 4096,
                "the frequencies of a class are below 4096 and add up to it");
    }
    for (std::size_t i = 0; i < rows; ++i)
        require(row_class.data()[i] >= 0 && static_cast<std::size_t>(row_class.data()[i]) < classes,
                "a row's class has frequencies");
    return {rows, columns, lanes, classes, row_class.data(), frequencies.data()};
}

nb::bytes symbols_encode(Matrix<const std::uint8_t> symbols, Vector<const std::int32_t> row_class,
                         Frequencies frequencies, std::size_t lanes) {
    const tenpak::Grid grid = grid_of(symbols.shape(0), symbols.shape(1), row_class, frequencies, lanes);
    for (std::size_t i = 0; i < grid.rows; ++i) {
        const std::uint16_t* table = grid.frequencies + static_cast<std::size_t>(grid.row_class[i]) * 256;
        const std::uint8_t* row = symbols.data() + i * grid.columns;
        require(std::all_of(row, row + grid.columns, [&](std::uint8_t symbol) { return table[symbol] > 0; }),
                "a symbol that occurs has a frequency");
    }
    std::vector<std::uint16_t> words;
    {
        nb::gil_scoped_release unlocked;
        words = tenpak::symbols_encode(grid, symbols.data());
    }
    return nb::bytes(words.data(), words.size() * sizeof(std::uint16_t));
}

bool symbols_decode(Vector<const std::uint16_t> words, Matrix<std::uint8_t> symbols,
                    Vector<const std::int32_t> row_class, Frequencies frequencies, std::size_t lanes) {
    const tenpak::Grid grid = grid_of(symbols.shape(0), symbols.shape(1), row_class, frequencies, lanes);
    nb::gil_scoped_release unlocked;
    return tenpak::symbols_decode(grid, words.data(), words.shape(0), symbols.data(), decoder());
}

void histogram(Matrix<const std::int32_t> levels, Counts counts, Vector<const std::int32_t> row_class,
               Vector<const std::int32_t> column_class, unsigned states, std::size_t segment) {
    require(states == 1 || tenpak::machine_of(states) != nullptr, "states is 1, 4, 8, 16, 32, 64, 128 or 256");
    require(segment > 0, "a segment has at least one row");
    require(levels.shape(0) == row_class.shape(0) && levels.shape(1) == column_class.shape(0),
            "one class per row and per column");
    require(counts.shape(0) == tenpak::kClasses && counts.shape(1) == 2 && counts.shape(2) > 0,
            "counts are [64, 2, sizes]");
    const tenpak::Layout layout{levels.shape(0),  levels.shape(1),     1,  segment, states,
                                row_class.data(), column_class.data(), {}};
    nb::gil_scoped_release unlocked;
    const std::vector<std::int64_t> found = tenpak::histogram(layout, levels.data(), counts.shape(2));
    std::copy(found.begin(), found.end(), counts.data());
}

std::vector<std::uint16_t> frequencies(int cls, int quantizer, Bytes shape) {
    require(cls >= 0 && cls < tenpak::kClasses, "a class is 0 to 63");
    require(shape.shape(0) == 4, "a shape has four bytes");
    const std::uint8_t* s = shape.data();
    const tenpak::Table table = tenpak::table_of(cls, quantizer, {s[0], s[1], s[2], s[3]});
    std::vector<std::uint16_t> found;
    for (unsigned i = 0; i < table.symbols(); ++i)
        found.push_back(static_cast<std::uint16_t>(table.start[i + 1] - table.start[i]));
    return found;
}

template <typename Level>
void product(Matrix<const float> x, Matrix<const Level> levels, Vector<const float> row_scale,
             Vector<const float> column_scale, Matrix<float> y, std::size_t threads) {
    const std::size_t count = x.shape(0), rows = levels.shape(0), columns = levels.shape(1);
    require(x.shape(1) == columns && column_scale.shape(0) == columns, "one input and one scale per column");
    require(row_scale.shape(0) == rows && y.shape(1) == rows, "one output and one scale per row");
    require(y.shape(0) == count, "one output per input");
    const tenpak::Product<Level> given{count,         rows,     columns, x.data(), levels.data(), row_scale.data(),
                                       column_scale.data(), y.data(), threads};
    nb::gil_scoped_release unlocked;
    switch (chosen) {
#if defined(TENPAK_X86)
        case Isa::avx512: return tenpak::avx512::product(given);
        case Isa::avx2: return tenpak::avx2::product(given);
#endif
        default: return tenpak::generic::product(given);
    }
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "The compiled core; tenpak.kernels documents and checks what it does.";
    m.def("instruction_sets", &instruction_sets, "Instruction sets that this machine can run, slowest first.");
    m.def("use", &use, "name"_a, "Use an instruction set from now on; returns the one used before.");
    m.def("quantize", &quantize, "weight"_a, "target"_a, "error"_a, "levels"_a, "feedback"_a, "row_step"_a,
          "column_step"_a, "rates"_a, "row_class"_a, "column_class"_a, "states"_a, "segment"_a);
    m.def("rans_encode", &rans_encode, "levels"_a, "row_class"_a, "column_class"_a, "shape"_a, "states"_a, "lanes"_a,
          "segment"_a);
    m.def("rans_decode", &rans_decode, "words"_a, "levels"_a, "row_class"_a, "column_class"_a, "shape"_a, "states"_a,
          "lanes"_a, "segment"_a);
    m.def("symbols_encode", &symbols_encode, "symbols"_a, "row_class"_a, "frequencies"_a, "lanes"_a);
    m.def("symbols_decode", &symbols_decode, "words"_a, "symbols"_a, "row_class"_a, "frequencies"_a, "lanes"_a);
    m.def("histogram", &histogram, "levels"_a, "counts"_a, "row_class"_a, "column_class"_a, "states"_a, "segment"_a);
    const auto products = [&]<typename Level>() {
        m.def("product", &product<Level>, "x"_a, "levels"_a.noconvert(), "row_scale"_a, "column_scale"_a, "y"_a,
              "threads"_a);
    };
    products.operator()<std::uint8_t>();
    products.operator()<std::int8_t>();
    products.operator()<std::int16_t>();
    products.operator()<std::int32_t>();
    m.def("frequencies", &frequencies, "cls"_a, "quantizer"_a, "shape"_a);
}
