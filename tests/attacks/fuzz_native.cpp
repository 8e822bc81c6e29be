// Streams that no encoder wrote, and weights of any size, through every variant of the core: test_native_sanitized.py
// builds this with sanitizers.
//
// fuzz_native ROUNDS SEED: each round draws a layout and levels, requires that they survive the way there and back, then
// decodes damaged copies of the words; does the same with bytes and tables of any kind; and quantizes a block. All
// variants must agree. Arrays are exactly as long as they must be, so that a read or write beyond them is seen.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "rans.hpp"
#include "trellis.hpp"

namespace {

struct Variant {
    bool (*decode)(const tenpak::Decoding&);
    void (*quantize)(const tenpak::Block&);
};

std::vector<Variant> variants() {
    std::vector<Variant> found{{tenpak::generic::decode, tenpak::generic::quantize}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) found.push_back({tenpak::avx2::decode, tenpak::avx2::quantize});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        found.push_back({tenpak::avx512::decode, tenpak::avx512::quantize});
#endif
    return found;
}

const std::vector<Variant> kVariants = variants();
constexpr unsigned kStates[] = {1, 4, 8, 16, 32, 64, 128, 256};
std::mt19937 generator;

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

std::size_t size(int low, int high) { return static_cast<std::size_t>(draw(low, high)); }

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

std::vector<std::int32_t> classes_of(std::size_t count, int low, int high) {
    std::vector<std::int32_t> drawn(count);
    for (auto& cls : drawn) cls = draw(low, high);
    return drawn;
}

// Entropy coding ------------------------------------------------------------------------------------------------------

// The levels that indices k, mostly small and sometimes as large as can be, stand for along the trellis.
std::vector<std::int32_t> levels_of(const tenpak::Layout& layout, int surprises) {
    std::vector<std::int32_t> levels(layout.rows * layout.columns);
    const tenpak::Machine* machine = layout.states == 1 ? nullptr : tenpak::machine_of(layout.states);
    for (std::size_t j = 0; j < layout.columns; ++j) {
        unsigned state = 0;
        for (std::size_t i = 0; i < layout.rows; ++i) {
            if (i % layout.segment == 0) state = 0;
            const std::int32_t k = draw(0, 99) < surprises ? draw(-(1 << draw(0, 20)), 1 << draw(0, 20)) : draw(-2, 2);
            const unsigned q = machine ? state & 1u : 0u;
            levels[i * layout.columns + j] = !machine ? k : 2 * k - (q ? (k > 0) - (k < 0) : 0);
            if (machine) state = (state >> 1) ^ (q ? machine->h0 : 0u) ^ (k & 1 ? machine->h1 : 0u);
        }
    }
    return levels;
}

// What the words decode to, or nothing.
std::vector<std::int32_t> decoded(const tenpak::Layout& layout, const std::vector<std::uint16_t>& words) {
    const std::vector<std::uint16_t> exact(words);
    std::vector<std::int32_t> first;
    for (std::size_t v = 0; v < kVariants.size(); ++v) {
        std::vector<std::int32_t> levels(layout.rows * layout.columns);
        if (!tenpak::rans_decode(layout, exact.data(), exact.size(), levels.data(), kVariants[v].decode)) levels.clear();
        require(v == 0 || levels == first, "variants decode words differently");
        first = levels;
    }
    return first;
}

void damage(std::vector<std::uint16_t>& words) {
    const int last = static_cast<int>(words.size()) - 1;
    const auto any = [&]() -> std::uint16_t& { return words[size(0, last)]; };
    switch (last < 0 ? 2 : draw(0, 4)) {
        case 0: any() ^= static_cast<std::uint16_t>(1 << draw(0, 15)); break;
        case 1: words.resize(size(0, last)); break;
        case 2: words.push_back(static_cast<std::uint16_t>(draw(0, 65535))); break;
        case 3: std::swap(any(), any()); break;
        default: for (auto& word : words) word = static_cast<std::uint16_t>(draw(0, 65535));
    }
}

void code() {
    tenpak::Layout layout{};
    layout.rows = size(0, 40);
    layout.lanes = draw(0, 1) ? std::size_t{16} << draw(0, 1) : size(1, 32);  // 16 and 32 have a way of their own
    layout.columns = draw(0, 1) ? layout.lanes * size(1, 2) : size(0, 40);
    layout.segment = size(1, 50);
    layout.states = kStates[draw(0, 7)];
    const int low = draw(-9, 70);  // few classes: their tables take most of the time
    const auto row_class = classes_of(layout.rows, low, low + draw(0, 1));
    const auto column_class = classes_of(layout.columns, 0, draw(0, 1));
    layout.row_class = row_class.data();
    layout.column_class = column_class.data();
    const auto byte = [] { return static_cast<std::uint8_t>(draw(0, 3) == 0 ? 255 * draw(0, 1) : draw(0, 255)); };
    layout.shape = {byte(), byte(), byte(), byte()};
    const auto levels = levels_of(layout, draw(0, 2) * 10);
    const auto words = tenpak::rans_encode(layout, levels.data());
    require(decoded(layout, words) == levels, "levels do not survive the way there and back");
    for (int copy = 0; copy < 6; ++copy) {
        auto damaged = words;
        for (int count = draw(1, 3); count > 0; --count) damage(damaged);
        const auto found = decoded(layout, damaged);
        require(damaged == words || found != levels || levels.empty(), "damaged words decode to the same levels");
    }
}

// Bytes ---------------------------------------------------------------------------------------------------------------

// What the words decode to, or nothing.
std::vector<std::uint8_t> decoded(const tenpak::Grid& grid, const std::vector<std::uint16_t>& words) {
    const std::vector<std::uint16_t> exact(words);
    std::vector<std::uint8_t> first;
    for (std::size_t v = 0; v < kVariants.size(); ++v) {
        std::vector<std::uint8_t> symbols(grid.rows * grid.columns);
        if (!tenpak::symbols_decode(grid, exact.data(), exact.size(), symbols.data(), kVariants[v].decode))
            symbols.clear();
        require(v == 0 || symbols == first, "variants decode bytes differently");
        first = symbols;
    }
    return first;
}

void code_bytes() {
    const std::size_t rows = size(0, 40), classes = size(1, 3);
    const std::size_t lanes = draw(0, 1) ? std::size_t{16} << draw(0, 1) : size(1, 32);
    const std::size_t columns = draw(0, 1) ? lanes * size(1, 2) : size(0, 40);
    const auto row_class = classes_of(rows, 0, static_cast<int>(classes) - 1);
    // Some symbols of any frequency; what is left of 2^12 goes to one of them.
    std::vector<std::uint16_t> frequencies(classes * 256);
    std::vector<std::vector<std::uint8_t>> occurring(classes);
    for (std::size_t cls = 0; cls < classes; ++cls) {
        int left = 4096;
        for (int count = draw(2, 256); count > 0; --count) {
            const std::size_t symbol = size(0, 255);
            if (frequencies[cls * 256 + symbol] > 0) continue;
            const int frequency = draw(1, 4096 / 256);
            frequencies[cls * 256 + symbol] = static_cast<std::uint16_t>(frequency);
            occurring[cls].push_back(static_cast<std::uint8_t>(symbol));
            left -= frequency;
        }
        if (occurring[cls].size() == 1) {
            const auto other = static_cast<std::uint8_t>(occurring[cls][0] ^ 1);
            frequencies[cls * 256 + other] = 1;
            --left;
        }
        frequencies[cls * 256 + occurring[cls][0]] =
            static_cast<std::uint16_t>(frequencies[cls * 256 + occurring[cls][0]] + left);
    }
    const tenpak::Grid grid{rows, columns, lanes, classes, row_class.data(), frequencies.data()};
    std::vector<std::uint8_t> symbols(rows * columns);
    for (std::size_t at = 0; at < symbols.size(); ++at) {
        const auto& known = occurring[static_cast<std::size_t>(row_class[at / columns])];
        symbols[at] = known[draw(0, 1) ? 0 : size(0, static_cast<int>(known.size()) - 1)];
    }
    const auto words = tenpak::symbols_encode(grid, symbols.data());
    require(decoded(grid, words) == symbols, "bytes do not survive the way there and back");
    for (int copy = 0; copy < 6; ++copy) {
        auto damaged = words;
        for (int count = draw(1, 3); count > 0; --count) damage(damaged);
        const auto found = decoded(grid, damaged);
        require(damaged == words || found != symbols || symbols.empty(), "damaged words decode to the same bytes");
    }
}

// Quantization --------------------------------------------------------------------------------------------------------

std::vector<float> floats(std::size_t count, float low, float high) {
    std::vector<float> drawn(count);
    for (auto& value : drawn) value = std::uniform_real_distribution<float>(low, high)(generator);
    return drawn;
}

void quantize() {
    const std::size_t rows = size(0, 40), columns = size(0, 5), count = rows * columns;
    const std::size_t known = size(0, 3), symbols = size(1, 4);
    auto weight = floats(count, -9, 9);
    for (auto& value : weight)
        if (draw(0, 9) == 0) value *= std::pow(10.0f, static_cast<float>(draw(-40, 20)));
    const auto feedback = floats(columns * columns, -1, 1), rates = floats(known * 2 * symbols, 0, 3);
    const auto row_step = floats(rows, 0.5f, 2), column_step = floats(columns, 0.5f, 2);
    const auto row_class = classes_of(rows, -5, 5), column_class = classes_of(columns, -5, 5);
    const unsigned states = kStates[draw(0, 7)];
    const std::size_t segment = size(1, 50);
    std::vector<std::int32_t> first;
    for (std::size_t v = 0; v < kVariants.size(); ++v) {
        std::vector<float> target(weight), error(count);
        std::vector<std::int32_t> levels(count);
        kVariants[v].quantize({rows, columns, weight.data(), target.data(), error.data(), levels.data(), feedback.data(),
                               row_step.data(), column_step.data(), known ? rates.data() : nullptr, row_class.data(),
                               column_class.data(), known, symbols, states, segment});
        require(v == 0 || levels == first, "variants quantize differently");
        first = levels;
    }
}

}  // namespace

int main(int argc, char** argv) {
    require(argc == 3, "usage: fuzz_native ROUNDS SEED");
    generator.seed(static_cast<unsigned>(std::atoi(argv[2])));
    for (int round = std::atoi(argv[1]); round > 0; --round) code(), code_bytes(), quantize();
    return 0;
}
