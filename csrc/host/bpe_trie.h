// A trie over byte strings, as a double array: the child of a node by a byte is one addition and one comparison away.
//
//   the child of node n by byte b stands at  base(n) + b, if the label there is b
//
// No two nodes have the same base, so the label is proof enough of the parent. A node is one 64-bit word: a walk is a
// chain of reads from memory, and its time is the number of cache lines.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string_view>
#include <vector>

namespace megascratch::bpe {

class Trie {
  public:
    static constexpr uint32_t kMaxStrings = (1 << 22) - 1;
    static constexpr unsigned kEnd = 256;  // what stands behind the last byte of a text

    /// Args: strings: distinct, each of the 256 single bytes among them; string i is found as the value i.
    explicit Trie(const std::vector<std::string_view>& strings) : starts_(kSymbols * kSymbols) {
        std::vector<uint32_t> order(strings.size());
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return strings[a] < strings[b]; });
        grow(first_);
        std::vector<Range> ranges{{kRoot, 0, uint32_t(order.size()), 0}};
        std::vector<Range> children;
        for (size_t next = 0; next < ranges.size(); ++next) {  // breadth first: short strings lie close together
            const Range range = ranges[next];
            children.clear();
            for (uint32_t i = range.first; i < range.last; ++i) {
                const std::string_view string = strings[order[i]];
                if (string.size() == range.depth) {
                    nodes_[range.node].value = order[i];
                    continue;
                }
                const uint8_t byte = uint8_t(string[range.depth]);
                if (children.empty() || children.back().node != byte) children.push_back({byte, i, i, range.depth + 1});
                children.back().last = i + 1;
            }
            if (children.empty()) continue;
            const uint64_t base = place(children);
            nodes_[range.node].base = base;
            for (const Range& child : children) {
                nodes_[base + child.node] = Node{kNowhere, child.node, nodes_[range.node].value};
                taken_[base + child.node] = true;
                ranges.push_back({uint32_t(base + child.node), child.first, child.last, child.depth});
            }
        }
        taken_ = bases_ = {};
        for (unsigned first = 0; first < 256; ++first)
            for (unsigned second = 0; second < kSymbols; ++second) {
                Walk walk{uint32_t(nodes_[kRoot].base), 0};
                step(walk, first);
                step(walk, second);
                starts_[first * kSymbols + second] = walk;
            }
    }

    /// A walk from the root along a text.
    struct Walk {
        uint32_t base;   // of the children that come next; kNowhere where no string goes on so
        uint32_t found;  // the value of the longest string so far

        bool over() const { return base == kNowhere; }
    };

    /// A walk that has gone two bytes; they may be kEnd.
    const Walk& begin(unsigned first, unsigned second) const { return starts_[first * kSymbols + second]; }

    /// Go a byte further, or kEnd. There are no branches in this: nobody can guess where a walk ends. What is chosen by
    /// masks the compiler would, with `?:`, choose by a branch.
    void step(Walk& walk, unsigned byte) const {
        const Node node = nodes_[walk.base + byte];
        const uint32_t if_matches = -uint32_t(node.label == byte);
        walk.base = uint32_t(node.base) & if_matches;
        walk.found ^= (walk.found ^ uint32_t(node.value)) & if_matches;
    }

    /// Ask for the memory that the next step needs.
    void touch(const Walk& walk, unsigned byte) const { __builtin_prefetch(&nodes_[walk.base + byte]); }

    /// The value of the longest string that a text begins with.
    uint32_t longest(const uint8_t* at, const uint8_t* end) const {
        const auto byte = [&](size_t i) { return i < size_t(end - at) ? unsigned(at[i]) : kEnd; };
        Walk walk = begin(at[0], byte(1));
        for (size_t depth = 2; !walk.over(); ++depth) step(walk, byte(depth));
        return walk.found;
    }

  private:
    static constexpr unsigned kSymbols = 257;
    static constexpr unsigned kFree = 511;                // the label of a slot without a node
    static constexpr uint32_t kNowhere = 0, kRoot = kEnd + 1;  // no node stands in reach of base 0
    struct Node {
        uint64_t base : 32, label : 10, value : 22;  // of the longest string on the way to it, where it has none itself
    };
    struct Range {  // strings order[first, last) share their first `depth` bytes, and end in `node`
        uint32_t node, first, last, depth;
    };

    /// Find a base of its own that leaves a free slot for each child's byte.
    uint64_t place(const std::vector<Range>& children) {
        const auto fits = [&](uint64_t base) {
            grow(base);
            return !bases_[base] && std::none_of(children.begin(), children.end(),
                                                 [&](const Range& child) { return taken_[base + child.node]; });
        };
        size_t misses = 0;
        uint64_t base = first_;
        while (!fits(base)) {
            ++base;
            if (++misses % kPatience == 0) first_ = base;  // or the search would cost the square of the nodes
        }
        bases_[base] = true;
        return base;
    }

    void grow(uint64_t base) {
        const size_t needed = base + 2 * kSymbols;
        if (needed <= nodes_.size()) return;
        nodes_.resize(std::max(needed, nodes_.size() * 3 / 2), Node{kNowhere, kFree, 0});
        taken_.resize(nodes_.size());
        bases_.resize(nodes_.size());
    }

    static constexpr size_t kPatience = 16;
    std::vector<Node> nodes_;
    std::vector<Walk> starts_;         // by the first two bytes
    std::vector<bool> taken_, bases_;  // slots that hold a node, and bases that a node has: while building
    uint64_t first_ = kRoot + 1;
};

}  // namespace megascratch::bpe
