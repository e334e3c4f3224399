// The BPE trainer: count distinct pre-tokens, then join the most frequent adjacent pair, again and again.
//
//   pre-tokens, counted                          low ×2   lower ×1
//   pairs                                        (l,o) 3   (o,w) 3   (w,e) 1   (e,r) 1
//   1st merge: (l,o) and (o,w) tie at 3; the pair with the smaller ids wins   →  lo w ×2, lo w e r ×1
//   pairs now                                    (lo,w) 3   (w,e) 1   (e,r) 1
//   2nd merge: (lo,w) → low ...
//
// Work is per distinct pre-token, and a merge visits only those that hold its pair. A pair arises only while the later of
// its two tokens is being made, so it enters the queue once, with the list of all words that hold it; from then on its
// count can only fall. The queue is lazy: an entry that surfaces with a count out of date goes back with the present one.
//
// A new token never spells an old one: where the same bytes stand between token borders, the same merges have been made
// in them, so that they are the old token already.
//
// Order and ties are those of the BpeTrainer in Hugging Face's `tokenizers`, and both learn the same merges.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <queue>
#include <string>
#include <vector>

#include "bpe_count.h"
#include "flat_table.h"

namespace megascratch::bpe {

struct Merge {
    int32_t left, right, id;
};

struct Trained {
    std::vector<std::string> tokens;  // in id order; the single bytes come first
    std::vector<Merge> merges;        // in the order in which they were learnt
};

class Trainer {
  public:
    /// Args: byte_order: the 256 byte values in the order of their ids.
    Trainer(const PieceTable& pieces, const std::string& byte_order) {
        int32_t id_of_byte[256];
        for (int32_t id = 0; id < 256; ++id) {
            id_of_byte[uint8_t(byte_order[size_t(id)])] = id;
            tokens_.push_back(byte_order.substr(size_t(id), 1));
        }
        words_.reserve(pieces.size());
        counts_.reserve(pieces.size());
        pieces.for_each([&](std::string_view piece, int64_t count) {
            words_.push_back({symbols_.size(), piece.size()});
            counts_.push_back(count);
            for (char byte : piece) symbols_.push_back(id_of_byte[uint8_t(byte)]);
        });
    }

    /// Merge until there are n_tokens tokens or no pair is left. Call once: it uses up the counts.
    ///
    /// Args: report: told the number of tokens now and then; an exception from it ends the training.
    Trained train(size_t n_tokens, const std::function<void(size_t)>& report) {
        constexpr size_t kReportEvery = 64;
        count_pairs();
        std::vector<Merge> merges;
        while (tokens_.size() < n_tokens && !queue_.empty()) {
            Candidate top = queue_.top();
            queue_.pop();
            const int64_t count = pairs_.find(top.key)->count;
            if (top.count != count) {
                top.count = count;
                queue_.push(top);
                continue;
            }
            if (count < 1) break;
            merges.push_back(merge(top));
            if (merges.size() % kReportEvery == 0) report(tokens_.size());
        }
        report(tokens_.size());
        return {std::move(tokens_), std::move(merges)};
    }

  private:
    struct Word {
        size_t start, length;  // its symbols: symbols_[start, start + length)
    };
    struct Pair {
        int64_t count = 0;
        int32_t fresh = -1;  // its place in fresh_ while one merge is made; -1 when it has none
    };
    struct Candidate {
        int64_t count;
        uint64_t key;
        uint32_t words;  // its place in occurrences_

        bool operator<(const Candidate& other) const {  // std::priority_queue puts the largest first
            return count != other.count ? count < other.count : key > other.key;
        }
    };
    struct Fresh {
        uint64_t key;
        std::vector<uint32_t> words;
    };

    void count_pairs() {
        for (uint32_t word = 0; word < words_.size(); ++word) {
            const int32_t* symbol = &symbols_[words_[word].start];
            for (size_t i = 0; i + 1 < words_[word].length; ++i) change(pair_key(symbol[i], symbol[i + 1]), +1, word);
        }
        push_fresh();
    }

    Merge merge(const Candidate& top) {
        const int32_t left = int32_t(top.key >> 32), right = int32_t(uint32_t(top.key));
        std::string bytes = tokens_[size_t(left)] + tokens_[size_t(right)];
        const int32_t id = int32_t(tokens_.size());
        tokens_.push_back(std::move(bytes));
        const std::vector<uint32_t> words = std::move(occurrences_[top.words]);
        occurrences_[top.words] = {};
        for (uint32_t word : words) merge_in_word(word, left, right, id);
        push_fresh();
        return {left, right, id};
    }

    /// Replace every (left, right) in a word by id, compacting it in place, and record how its pairs change.
    void merge_in_word(uint32_t index, int32_t left, int32_t right, int32_t id) {
        Word& word = words_[index];
        int32_t* symbol = &symbols_[word.start];
        size_t write = 0;
        for (size_t read = 0; read < word.length;) {
            if (symbol[read] != left || read + 1 == word.length || symbol[read + 1] != right) {
                symbol[write++] = symbol[read++];
                continue;
            }
            if (write > 0) {
                change(pair_key(symbol[write - 1], left), -1, index);
                change(pair_key(symbol[write - 1], id), +1, index);
            }
            symbol[write++] = id;
            read += 2;
            if (read < word.length) {
                change(pair_key(right, symbol[read]), -1, index);
                change(pair_key(id, symbol[read]), +1, index);
            }
        }
        word.length = write;
    }

    void change(uint64_t key, int sign, uint32_t word) {
        Pair& pair = pairs_[key];
        pair.count += sign * counts_[word];
        if (sign < 0) return;
        if (pair.fresh < 0) {
            pair.fresh = int32_t(fresh_.size());
            fresh_.push_back({key, {}});
        }
        std::vector<uint32_t>& words = fresh_[size_t(pair.fresh)].words;
        if (words.empty() || words.back() != word) words.push_back(word);  // words are visited one after the other
    }

    void push_fresh() {
        for (Fresh& fresh : fresh_) {
            Pair& pair = pairs_[fresh.key];
            pair.fresh = -1;
            if (pair.count < 1) continue;
            queue_.push({pair.count, fresh.key, uint32_t(occurrences_.size())});
            occurrences_.push_back(std::move(fresh.words));
        }
        fresh_.clear();
    }

    std::vector<int64_t> counts_;
    std::vector<std::string> tokens_;
    std::vector<int32_t> symbols_;
    std::vector<Word> words_;
    PairTable<Pair> pairs_;
    std::vector<Fresh> fresh_;
    std::vector<std::vector<uint32_t>> occurrences_;
    std::priority_queue<Candidate> queue_;
};

}  // namespace megascratch::bpe
