#include "rans.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace tenpak {
namespace {

// 2^(30 - f/256) for f = 0 … 255, from 2^(-1/256), 2^(-1/128) … 2^(-1/2) in units of 2^-32.
std::array<std::uint32_t, 256> powers() {
    constexpr std::uint64_t roots[8] = {4283353945u, 4271771996u, 4248701965u, 4202935003u,
                                        4112874773u, 3938502376u, 3611622603u, 3037000500u};
    std::array<std::uint32_t, 256> table{};
    for (unsigned f = 0; f < 256; ++f) {
        std::uint64_t value = 1u << 30;
        for (unsigned bit = 0; bit < 8; ++bit)
            if (f >> bit & 1) value = (value * roots[bit] + (1u << 31)) >> 32;
        table[f] = static_cast<std::uint32_t>(value);
    }
    return table;
}

// exp(-v²/2s²) in units of 2^-30, and the same for a standard deviation of 2s.
struct Density {
    std::uint64_t narrow, wide;
};

Density density(std::int64_t v, int cls) {
    static const std::array<std::uint32_t, 256> table = powers();
    constexpr std::uint64_t scale[2] = {12102203, 8557550};  // 128·log2(e)·2^16, and over sqrt(2)
    const auto square = static_cast<std::uint64_t>(v * v);
    const std::uint64_t energy = (square * scale[cls & 1]) >> (10 + (cls >> 1));  // in 1/256 octaves
    const auto power = [&](std::uint64_t t) -> std::uint64_t { return t >> 8 > 30 ? 0 : table[t & 255] >> (t >> 8); };
    return {power(energy), power(energy >> 2)};
}

}  // namespace

Table table_of(int cls, int q, const Shape& shape) {
    Table table;
    table.shift = static_cast<unsigned>(std::max((cls - 12) / 4 - 4, 0));
    std::array<std::uint64_t, 2 * kReach + 1> weight{};
    std::uint64_t total = 0;
    for (int symbol = -kReach; symbol <= kReach; ++symbol) {
        std::int64_t level = 2 * std::int64_t{symbol};
        std::uint64_t cell = 64;
        if (table.shift != 0) {
            level = level * (1 << table.shift) + (1 << table.shift) - 1;
        } else {
            if (q && symbol != 0) level -= symbol > 0 ? 1 : -1;
            if (symbol == 0) cell = q ? shape.zero1 : shape.zero0;
            if (q && std::abs(symbol) == 1) cell = shape.one1;
        }
        const Density found = density(level, cls);
        const std::uint64_t mixed = (256u - shape.tail) * found.narrow + ((shape.tail * found.wide) >> 1);
        total += weight[static_cast<std::size_t>(symbol + kReach)] = cell * mixed;
    }
    if (total == 0) total = weight[kReach] = 1;  // a shape of zeros: everything else is an escape
    const auto share = [&](int symbol) {
        return (weight[static_cast<std::size_t>(symbol + kReach)] << kPrecision) / total;
    };
    // A symbol that would get less than half a unit of frequency is left to the escape.
    const auto rare = [&](int symbol) {
        return (weight[static_cast<std::size_t>(symbol + kReach)] << (kPrecision + 1)) < total;
    };
    while (table.reach < kReach && !(rare(table.reach + 1) && rare(-table.reach - 1))) ++table.reach;
    std::array<unsigned, 2 * kReach + 2> frequency{};
    std::uint64_t inside = 0;
    unsigned sum = 0;
    for (int symbol = -table.reach; symbol <= table.reach; ++symbol) {
        inside += weight[static_cast<std::size_t>(symbol + kReach)];
        const auto index = static_cast<std::size_t>(symbol + table.reach);
        sum += frequency[index] = static_cast<unsigned>(std::max<std::uint64_t>(share(symbol), 1));
    }
    const std::size_t escape = table.symbols() - 1;
    // Where nothing is inside (a shape with zeros) one unit is left for it.
    sum += frequency[escape] = static_cast<unsigned>(
        std::clamp<std::uint64_t>(((total - inside) << kPrecision) / total, 1, (1u << kPrecision) - 1));
    // What rounding leaves goes to the largest frequency, and what it took comes from there.
    const auto largest = std::max_element(frequency.begin(), frequency.begin() + static_cast<std::ptrdiff_t>(escape));
    *largest = static_cast<unsigned>(static_cast<int>(*largest) + (1 << kPrecision) - static_cast<int>(sum));
    unsigned start = 0;
    for (std::size_t i = 0; i <= escape; ++i) {
        table.start[i] = static_cast<std::uint16_t>(start);
        start += frequency[i];
    }
    table.start[escape + 1] = static_cast<std::uint16_t>(start);
    return table;
}

namespace {

// The tables that a layout can need, by class.
struct Tables {
    int first = 0, last = -1;
    std::vector<Table> tables;  // [class - first][q]

    explicit Tables(const Layout& layout) {
        if (layout.rows == 0 || layout.columns == 0) return;
        const auto [low_row, high_row] = std::minmax_element(layout.row_class, layout.row_class + layout.rows);
        const auto [low_column, high_column] =
            std::minmax_element(layout.column_class, layout.column_class + layout.columns);
        first = clip(std::int64_t{*low_row} + *low_column);
        last = clip(std::int64_t{*high_row} + *high_column);
        for (int cls = first; cls <= last; ++cls)
            for (int q = 0; q < 2; ++q) tables.push_back(table_of(cls, q, layout.shape));
    }
    static int clip(std::int64_t cls) { return static_cast<int>(std::clamp<std::int64_t>(cls, 0, kClasses - 1)); }
    [[nodiscard]] std::size_t at(std::int64_t cls, unsigned q) const {
        return static_cast<std::size_t>(clip(cls) - first) * 2 + q;
    }
};

struct State {
    Machine machine;
    bool trellis;
    explicit State(unsigned states) : machine(*machine_of(states == 1 ? 4 : states)), trellis(states != 1) {}
    [[nodiscard]] unsigned quantizer(unsigned state) const { return trellis ? state & 1u : 0u; }
    [[nodiscard]] unsigned next(unsigned state, std::int32_t k) const {
        const unsigned moved = (state >> 1) ^ (state & 1u ? machine.h0 : 0u) ^ (k & 1 ? machine.h1 : 0u);
        return trellis ? moved : 0u;
    }
    [[nodiscard]] std::int32_t index(std::int32_t level, unsigned q) const {
        if (!trellis) return level;
        return q ? (level + (level > 0) - (level < 0)) / 2 : level / 2;
    }
    [[nodiscard]] std::int32_t level(std::int32_t k, unsigned q) const {
        if (!trellis) return k;
        return q ? 2 * k - (k > 0) + (k < 0) : 2 * k;
    }
};

class Writer {
  public:
    explicit Writer(std::size_t lanes) : states_(lanes, kLower) {}
    void put(std::size_t lane, unsigned start, unsigned frequency, unsigned precision) {
        std::uint32_t& x = states_[lane];
        if (x >= (std::uint64_t{frequency} << (32 - precision))) {
            words_.push_back(static_cast<std::uint16_t>(x));
            x >>= 16;
        }
        x = ((x / frequency) << precision) + x % frequency + start;
    }
    void bits(std::size_t lane, std::uint32_t value, unsigned count) {
        for (; count > 12; count -= 12, value >>= 12) put(lane, value & 0xFFF, 1, 12);
        if (count > 0) put(lane, value, 1, count);
    }
    std::vector<std::uint16_t> finish() {
        for (std::size_t lane = states_.size(); lane-- > 0;) {
            words_.push_back(static_cast<std::uint16_t>(states_[lane]));
            words_.push_back(static_cast<std::uint16_t>(states_[lane] >> 16));
        }
        std::reverse(words_.begin(), words_.end());
        return std::move(words_);
    }

  private:
    std::vector<std::uint32_t> states_;
    std::vector<std::uint16_t> words_;
};

// An escape: how many bits the distance beyond the reach has, those bits without the highest, the sign.
void put_escape(Writer& writer, std::size_t lane, std::int32_t symbol, int reach) {
    const auto beyond = static_cast<std::uint32_t>(std::abs(symbol) - reach);
    unsigned width = 0;
    while (beyond >> (width + 1)) ++width;
    // What is decoded last is encoded first.
    writer.bits(lane, symbol < 0, 1);
    writer.bits(lane, beyond & ((1u << width) - 1), width);
    writer.bits(lane, width, 5);
}

}  // namespace

std::vector<std::uint16_t> rans_encode(const Layout& layout, const std::int32_t* levels) {
    const Tables tables(layout);
    const State state(layout.states);
    const std::size_t lanes = layout.lanes, rows = layout.rows, columns = layout.columns;
    Writer writer(lanes);
    std::vector<std::uint8_t> quantizer(rows * lanes);
    std::vector<unsigned> states(lanes);
    const std::size_t groups = (columns + lanes - 1) / lanes;
    for (std::size_t group = groups; group-- > 0;) {
        const std::size_t first = group * lanes, width = std::min(lanes, columns - first);
        for (std::size_t i = 0; i < rows; ++i) {
            if (i % layout.segment == 0) std::fill(states.begin(), states.end(), 0u);
            for (std::size_t lane = 0; lane < width; ++lane) {
                const unsigned q = state.quantizer(states[lane]);
                quantizer[i * lanes + lane] = static_cast<std::uint8_t>(q);
                states[lane] = state.next(states[lane], state.index(levels[i * columns + first + lane], q));
            }
        }
        for (std::size_t i = rows; i-- > 0;)
            for (std::size_t lane = width; lane-- > 0;) {
                const unsigned q = quantizer[i * lanes + lane];
                const std::int64_t cls = std::int64_t{layout.row_class[i]} + layout.column_class[first + lane];
                const Table& table = tables.tables[tables.at(cls, q)];
                const std::int32_t k = state.index(levels[i * columns + first + lane], q);
                const std::int32_t symbol = k >> table.shift;
                writer.bits(lane, static_cast<std::uint32_t>(k) & ((1u << table.shift) - 1), table.shift);
                std::size_t place = static_cast<std::size_t>(symbol + table.reach);
                if (symbol < -table.reach || symbol > table.reach) {
                    put_escape(writer, lane, symbol, table.reach);
                    place = table.symbols() - 1;
                }
                const unsigned start = table.start[place];
                writer.put(lane, start, table.start[place + 1] - start, kPrecision);
            }
    }
    return writer.finish();
}

std::vector<std::int64_t> histogram(const Layout& layout, const std::int32_t* levels, std::size_t sizes) {
    const State state(layout.states);
    std::vector<std::int64_t> counts(kClasses * 2 * sizes);
    std::vector<unsigned> states(layout.columns);
    for (std::size_t i = 0; i < layout.rows; ++i, levels += layout.columns) {
        if (i % layout.segment == 0) std::fill(states.begin(), states.end(), 0u);
        for (std::size_t j = 0; j < layout.columns; ++j) {
            const unsigned q = state.quantizer(states[j]);
            const std::int32_t k = state.index(levels[j], q);
            const std::int64_t sum = std::int64_t{layout.row_class[i]} + layout.column_class[j];
            const auto cls = static_cast<std::size_t>(Tables::clip(sum));
            ++counts[(cls * 2 + q) * sizes + std::min(static_cast<std::size_t>(std::abs(k)), sizes - 1)];
            states[j] = state.next(states[j], k);
        }
    }
    return counts;
}

namespace {

// What each slot of the tables stands for, as Decoding has it.
struct Slots {
    std::vector<Context> contexts;
    std::vector<std::uint32_t> slots;
    std::vector<std::uint8_t> symbols;

    explicit Slots(const Tables& tables)
        : slots(tables.tables.size() << kPrecision), symbols(tables.tables.size() << kPrecision) {
        std::size_t at = 0;
        for (const Table& table : tables.tables) {
            contexts.push_back({table.reach, table.shift});
            for (unsigned symbol = 0; symbol < table.symbols(); ++symbol) {
                const bool plain = table.shift == 0 && symbol + 1 < table.symbols();
                const std::int32_t k = plain ? static_cast<std::int32_t>(symbol) - table.reach : kRare;
                const unsigned frequency = table.start[symbol + 1] - table.start[symbol];
                const std::uint32_t slot = (static_cast<std::uint32_t>(k) << 24) | ((frequency - 1) << 12);
                for (unsigned place = 0; place < frequency; ++place, ++at) {
                    slots[at] = slot | place;
                    symbols[at] = static_cast<std::uint8_t>(symbol);
                }
            }
        }
    }
};

}  // namespace

bool rans_decode(const Layout& layout, const std::uint16_t* words, std::size_t count, std::int32_t* levels,
                 bool (*decode)(const Decoding&)) {
    const Tables tables(layout);
    const Slots slots(tables);
    const State state(layout.states);
    Decoding decoding{layout.rows,
                      layout.columns,
                      layout.lanes,
                      layout.segment,
                      layout.row_class,
                      layout.column_class,
                      tables.first,
                      tables.last,
                      slots.contexts.data(),
                      slots.slots.data(),
                      slots.symbols.data(),
                      state.trellis ? state.machine.h0 : 0,
                      state.trellis ? state.machine.h1 : 0,
                      state.trellis ? 1u : 0u,
                      {},
                      {},
                      words,
                      count,
                      levels};
    for (unsigned s = 0; s < layout.states; ++s)
        for (int parity = 0; parity < 2; ++parity)
            decoding.next[s][static_cast<std::size_t>(parity)] = static_cast<std::uint8_t>(state.next(s, parity));
    for (unsigned q = 0; q < 2; ++q)
        for (std::int32_t k = -128; k < 128; ++k)
            decoding.level[q][static_cast<std::size_t>(k & 255)] = static_cast<std::int16_t>(state.level(k, q));
    return decode(decoding);
}

// Bytes ---------------------------------------------------------------------------------------------------------------

namespace {

constexpr unsigned kSymbols = 256;

// The inner loop knows levels -128 … 127 and reads -128 slowly: that is to be the rarest symbol, others follow it.
unsigned rarest(const Grid& grid) {
    std::array<std::uint32_t, kSymbols> sum{};
    for (std::size_t cls = 0; cls < grid.classes; ++cls)
        for (unsigned symbol = 0; symbol < kSymbols; ++symbol) sum[symbol] += grid.frequencies[cls * kSymbols + symbol];
    return static_cast<unsigned>(std::min_element(sum.begin(), sum.end()) - sum.begin());
}

// What Decoding wants: tables of Q0 and Q1, of which there is but Q0.
struct ByteSlots {
    std::vector<Context> contexts;
    std::vector<std::uint32_t> slots;
    std::vector<std::uint8_t> symbols;

    ByteSlots(const Grid& grid, unsigned first)
        : contexts(grid.classes * 2, Context{128, 0}), slots(contexts.size() << kPrecision), symbols(slots.size()) {
        for (std::size_t cls = 0; cls < grid.classes; ++cls) {
            std::size_t at = cls << (kPrecision + 1);
            const std::size_t end = at + (1u << kPrecision);
            for (unsigned symbol = 0; symbol < kSymbols; ++symbol) {
                const std::uint32_t frequency = grid.frequencies[cls * kSymbols + symbol];
                const unsigned index = (symbol - first) % kSymbols;
                const std::uint32_t slot = ((index - 128) << 24) | ((frequency - 1) << 12);
                for (std::uint32_t place = 0; place < frequency && at < end; ++place, ++at) {
                    slots[at] = slot | place;
                    symbols[at] = static_cast<std::uint8_t>(index);
                }
            }
        }
    }
};

}  // namespace

std::vector<std::uint16_t> symbols_encode(const Grid& grid, const std::uint8_t* symbols) {
    std::vector<std::uint16_t> starts(grid.classes * kSymbols);
    for (std::size_t at = 0; at < starts.size(); ++at)
        starts[at] = static_cast<std::uint16_t>(at % kSymbols ? starts[at - 1] + grid.frequencies[at - 1] : 0);
    Writer writer(grid.lanes);
    for (std::size_t group = (grid.columns + grid.lanes - 1) / grid.lanes; group-- > 0;) {
        const std::size_t first = group * grid.lanes, width = std::min(grid.lanes, grid.columns - first);
        for (std::size_t i = grid.rows; i-- > 0;)
            for (std::size_t lane = width; lane-- > 0;) {
                const std::size_t at = static_cast<std::size_t>(grid.row_class[i]) * kSymbols +
                                       symbols[i * grid.columns + first + lane];
                writer.put(lane, starts[at], grid.frequencies[at], kPrecision);
            }
    }
    return writer.finish();
}

bool symbols_decode(const Grid& grid, const std::uint16_t* words, std::size_t count, std::uint8_t* symbols,
                    bool (*decode)(const Decoding&)) {
    const unsigned first = rarest(grid);
    const ByteSlots slots(grid, first);
    const std::vector<std::int32_t> column_class(grid.columns);
    const std::size_t size = grid.rows * grid.columns;
    const auto levels = std::make_unique_for_overwrite<std::int32_t[]>(size);
    Decoding decoding{grid.rows,
                      grid.columns,
                      grid.lanes,
                      std::max<std::size_t>(grid.rows, 1),
                      grid.row_class,
                      column_class.data(),
                      0,
                      static_cast<std::int32_t>(grid.classes) - 1,
                      slots.contexts.data(),
                      slots.slots.data(),
                      slots.symbols.data(),
                      0,
                      0,
                      0,
                      {},
                      {},
                      words,
                      count,
                      levels.get()};
    for (std::int32_t k = -128; k < 128; ++k)
        decoding.level[0][static_cast<std::size_t>(k & 255)] = static_cast<std::int16_t>(k);
    if (!decode(decoding)) return false;
    for (std::size_t i = 0; i < size; ++i)
        symbols[i] = static_cast<std::uint8_t>(static_cast<unsigned>(levels[i]) + 128 + first);
    return true;
}

}  // namespace tenpak
