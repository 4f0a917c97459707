// Which value each link of a chain reads and adds, from a line of text, and for how long values and
// their gradients are needed.
#pragma once

#include <algorithm>
#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

#include "call.h"
#include "chain/values.h"

namespace fusedres {

// What a link may have beside its weight; of those after kGate nobody asks for a gradient.
constexpr int kRunningMean = kInputs, kRunningVar = kInputs + 1, kSlots = kInputs + 2;
constexpr int kKinds[] = {kBias, kNormWeight, kNormBias, kGate, kRunningMean, kRunningVar};
constexpr int kCount = std::size(kKinds);

// A link's line: which of kKinds it has, as a number of bits; "^" and how many values before the
// latest one its input is, if it is not that; "<" and how many before it what its `add` takes is, if
// that is not its input; a space, the recipe.
struct Line {
  int there;
  int64_t from, back;
  const Recipe& recipe;

  static std::vector<Line> of(const std::string& text) {
    std::vector<Line> lines;
    std::istringstream stream(text);
    std::string line;
    while (std::getline(stream, line)) {
      const size_t space = line.find(' ');
      const std::string head = line.substr(0, std::min(space, line.size()));
      int there = -1, from = 0, back = -1, used = 0, more = 0;
      bool right = space != line.npos && std::sscanf(head.c_str(), "%2d%n", &there, &used) == 1;
      if (right && std::sscanf(head.c_str() + used, "^%6d%n", &from, &more) == 1) used += more;
      if (right && std::sscanf(head.c_str() + used, "<%6d%n", &back, &more) == 1) used += more;
      right &= used == static_cast<int>(head.size()) && there >= 0 && there < 1 << kCount;
      STD_TORCH_CHECK(right && from >= 0 && back >= -1, "fusedres: no link '", line, "'");
      lines.push_back(
          {there, from, back < 0 ? from : back, fusedres::recipe(line.substr(space + 1))});
    }
    STD_TORCH_CHECK(!lines.empty(), "fusedres: a chain without links");
    return lines;
  }
};

// Value 0 is x, value l + 1 what link l gives. In backward the gradient of a value is what its first
// reader makes of it, the last one to be walked back, plus what at most one other link sends there.
struct Wiring {
  std::vector<int64_t> from, adds;  // each link's input; what its `add` takes, -1: it has none
  std::vector<int64_t> reader;      // of each value, the first link whose input it is; -1: none is

  int64_t size() const { return static_cast<int64_t>(from.size()); }
  bool adds_another(int64_t l) const { return adds[l] >= 0 && adds[l] != from[l]; }

  void append(const Line& line) {
    const int64_t l = size(), input = l - line.from, added = l - line.back;
    const bool has = line.recipe.has(Stage::add);
    STD_TORCH_CHECK(input >= 0 && added >= 0, "fusedres: link ", l, " takes value ",
                    std::min(input, added), ", which is not there");
    const auto& early = line.recipe.prologue;
    STD_TORCH_CHECK(
        input == added || (has && std::find(early.begin(), early.end(), Stage::add) == early.end()),
        "fusedres: only an add after linear takes another value than its link's input");
    from.push_back(input);
    adds.push_back(has ? added : -1);
  }
  void repeat(int64_t block) {  // the link of a block before
    const int64_t l = size() - block;
    from.push_back(from[l] + block);
    adds.push_back(adds[l] < 0 ? -1 : adds[l] + block);
  }

  // Once all are there.
  void close() {
    const int64_t L = size();
    std::vector<int64_t> more(L, 0);  // who sends a gradient besides the first reader
    reader.assign(L, -1);
    for (int64_t l = 0; l < L; ++l) {
      int64_t& first = reader[from[l]];
      if (first < 0)
        first = l;
      else
        ++more[from[l]];
    }
    for (int64_t l = 0; l < L; ++l) {
      if (adds[l] < 0) continue;
      const bool sends = reader[adds[l]] >= 0, late = reader[from[l]] != l;
      STD_TORCH_CHECK(++more[adds[l]] <= 1, "fusedres: two links add value ", adds[l],
                      ", or add it and read it again");
      STD_TORCH_CHECK(!sends || (!late && reader[adds[l]] <= l), "fusedres: link ", l,
                      " reads a value again, or adds one that is read later");
    }
    for (int64_t v = 0; v < L; ++v)
      STD_TORCH_CHECK(more[v] <= 1 && (more[v] == 1 || reader[v] >= 0), "fusedres: value ", v,
                      more[v] ? " is read too often" : " is not read");
  }

  // ---- memory that is soon free again; a step is a link's, those of backward from the last one on

  // For each value that is not `kept`: from the link that gives it to the last that takes it.
  Turns value_turns(const std::vector<bool>& kept) const {
    std::vector<Turns::Life> lives{{0, -1}};  // x has its own
    for (int64_t v = 1; v < size(); ++v) lives.push_back({v - 1, v - 1});
    for (int64_t l = 0; l < size(); ++l)
      for (const int64_t v : {from[l], adds[l]})
        if (v > 0) lives[v].end = std::max(lives[v].end, l);
    for (int64_t v = 1; v < size(); ++v)
      if (kept[v]) lives[v].end = -1;
    return Turns(lives);
  }
  // For each value's gradient, but x's and the last one's: from the link that gives it to the one
  // that gave the value, or to the reader of what that one adds, which may take it as it is.
  Turns gradient_turns() const {
    std::vector<Turns::Life> lives(size(), {0, -1});
    for (int64_t l = 0; l < size(); ++l)
      if (adds_another(l) && reader[adds[l]] < 0) lives[adds[l]].begin = size() - 1 - l;
    for (int64_t v = 1; v < size(); ++v) {
      if (reader[v] >= 0) lives[v].begin = size() - 1 - reader[v];
      lives[v].end = size() - 1 - std::min(v - 1, target(v - 1));
    }
    return Turns(lives);
  }
  // For what each link sends to the first reader of a value.
  Turns skip_turns() const {
    std::vector<Turns::Life> lives;
    for (int64_t l = 0; l < size(); ++l) lives.push_back({size() - 1 - l, size() - 1 - target(l)});
    return Turns(lives);
  }

 private:
  // Whom a link sends a gradient to, besides its own input's; or itself.
  int64_t target(int64_t l) const {
    if (reader[from[l]] != l) return reader[from[l]];
    return adds[l] >= 0 && reader[adds[l]] >= 0 ? reader[adds[l]] : l;
  }
};

}  // namespace fusedres
