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
    static constexpr uint32_t kNone = UINT32_MAX;
    static constexpr uint32_t kMaxStrings = (1 << 22) - 1;

    /// Args: strings: distinct and not empty; string i is found as the value i.
    explicit Trie(const std::vector<std::string_view>& strings) {
        std::vector<uint32_t> order(strings.size());
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return strings[a] < strings[b]; });
        grow(0);
        nodes_[0] = Node{0, 0, kNoValue};
        std::vector<Range> ranges{{0, 0, uint32_t(order.size()), 0}};
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
                if (children.empty() || children.back().node != byte) children.push_back({byte, i, i, 0});
                children.back().last = i + 1;
            }
            const uint64_t base = place(children);
            nodes_[range.node].base = base & kMaxBase;
            for (const Range& child : children) {
                nodes_[base + child.node] = Node{0, uint8_t(child.node), kNoValue};
                taken_[base + child.node] = true;
                ranges.push_back({uint32_t(base + child.node), child.first, child.last, range.depth + 1});
            }
        }
        taken_ = bases_ = {};
    }

    /// A walk from the root along a text.
    struct Walk {
        const uint8_t* at;
        uint64_t base;
        uint32_t found = kNone;  // the value of the longest string so far
    };

    Walk begin(const uint8_t* at) const { return {at, nodes_[0].base}; }

    /// Go one byte further; false where no string goes on so.
    bool step(Walk& walk) const {
        const Node node = nodes_[walk.base + *walk.at];
        if (node.label != *walk.at || node.value == kFree) return false;
        if (node.value != kNoValue) walk.found = node.value;
        walk.base = node.base;
        ++walk.at;
        return true;
    }

    /// Ask for the memory that the next step needs.
    void touch(const Walk& walk) const { __builtin_prefetch(&nodes_[walk.base + *walk.at]); }

    /// The value of the longest string that the text begins with, or kNone.
    uint32_t longest(const uint8_t* at, const uint8_t* end) const {
        Walk walk = begin(at);
        while (walk.at < end && step(walk)) {
        }
        return walk.found;
    }

  private:
    static constexpr uint32_t kNoValue = kMaxStrings, kFree = kMaxStrings - 1;
    static constexpr uint64_t kMaxBase = (uint64_t(1) << 34) - 1;
    struct Node {
        uint64_t base : 34, label : 8, value : 22;
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
        const size_t needed = base + 2 * 256;
        if (needed <= nodes_.size()) return;
        nodes_.resize(std::max(needed, nodes_.size() * 3 / 2), Node{0, 0, kFree});
        taken_.resize(nodes_.size());
        bases_.resize(nodes_.size());
    }

    static constexpr size_t kPatience = 16;
    std::vector<Node> nodes_;
    std::vector<bool> taken_, bases_;  // slots that hold a node, and bases that a node has: while building
    uint64_t first_ = 1;
};

}  // namespace megascratch::bpe
