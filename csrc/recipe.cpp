// Reads what fusedres/spec.py writes: "linear-norm-act-add norm=layer activation=gelu eps=1e-06".
#include <algorithm>
#include <locale>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "params.h"

namespace fusedres {
namespace {

template <class E>
E lookup(const std::map<std::string, E>& table, const char* what, const std::string& name) {
  const auto found = table.find(name);
  if (found == table.end())
    throw std::invalid_argument(std::string("unknown ") + what + " '" + name + "'");
  return found->second;
}

const std::map<std::string, Stage> kStages = {
    {"norm", Stage::norm}, {"act", Stage::act},         {"linear", Stage::linear},
    {"gate", Stage::gate}, {"dropout", Stage::dropout}, {"droppath", Stage::droppath},
    {"add", Stage::add},
};
const std::map<std::string, Norm> kNorms = {
    {"layer", Norm::layer}, {"rms", Norm::rms}, {"batch", Norm::batch}};
const std::map<std::string, Act> kActs = {
    {"relu", Act::relu},
    {"leaky_relu", Act::leaky_relu},
    {"relu2", Act::relu2},
    {"relu6", Act::relu6},
    {"elu", Act::elu},
    {"selu", Act::selu},
    {"gelu", Act::gelu},
    {"gelu_tanh", Act::gelu_tanh},
    {"silu", Act::silu},
    {"mish", Act::mish},
    {"softplus", Act::softplus},
    {"hardswish", Act::hardswish},
    {"hardsigmoid", Act::hardsigmoid},
    {"sigmoid", Act::sigmoid},
    {"tanh", Act::tanh},
    {"sin", Act::sin},
    {"softsign", Act::softsign},
};

const std::map<std::string, DType> kDTypes = {{"float32", DType::float32},
                                              {"bfloat16", DType::bfloat16},
                                              {"float16", DType::float16},
                                              {"float64", DType::float64}};

// With a decimal point, whatever the process's locale says of it: std::stod would ask.
double number(const std::string& text) {
  std::istringstream in(text);
  in.imbue(std::locale::classic());
  double value = 0;
  if (!(in >> value) || in.peek() != std::istringstream::traits_type::eof())
    throw std::invalid_argument("'" + text + "' is no number");
  return value;
}

Recipe parse(const std::string& text) {
  Recipe r;
  std::istringstream words(text);
  std::string word, stage;
  words >> word;
  std::istringstream stages(word);
  bool linear = false;
  while (std::getline(stages, stage, '-')) {
    const Stage s = lookup(kStages, "stage", stage);
    if (s == Stage::linear)
      linear = true;
    else
      (linear ? r.epilogue : r.prologue).push_back(s);
  }
  if (!linear) throw std::invalid_argument("order '" + word + "' has no 'linear' stage");
  while (words >> word) {
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals),
                      value = equals == word.npos ? "" : word.substr(equals + 1);
    if (name == "norm")
      r.norm = lookup(kNorms, "norm", value);
    else if (name == "activation")
      r.act = lookup(kActs, "activation", value);
    else if (name == "gate")
      r.scalar_gate = value == "scalar";
    else if (name == "batch_stats")
      r.batch_stats = value == "1";
    else if (name == "y_dtype")
      r.y_dtype = lookup(kDTypes, "dtype", value);
    else if (name == "x_dtype")
      r.x_dtype = lookup(kDTypes, "dtype", value);
    else if (name == "residual_dtype")
      r.residual_dtype = lookup(kDTypes, "dtype", value);
    else if (name == "eps")
      r.eps = number(value);
    else if (name == "dropout")
      r.dropout = number(value);
    else if (name == "drop_path")
      r.drop_path = number(value);
    else if (name == "residual_scale")
      r.residual_scale = number(value);
    else
      throw std::invalid_argument("unknown setting '" + word + "' in recipe '" + text + "'");
  }
  if (r.has(Stage::norm) && r.norm == Norm::none)
    throw std::invalid_argument("recipe '" + text + "' names no norm");
  if (r.has(Stage::act) && r.act == Act::none)
    throw std::invalid_argument("recipe '" + text + "' names no activation");
  return r;
}

bool contains(const std::vector<Stage>& stages, Stage stage) {
  for (Stage s : stages)
    if (s == stage) return true;
  return false;
}

}  // namespace

bool Recipe::has(Stage stage) const {
  return contains(prologue, stage) || contains(epilogue, stage);
}

bool Recipe::saves_residual() const {
  if (contains(prologue, Stage::add)) return true;
  const auto add = std::find(epilogue.begin(), epilogue.end(), Stage::add);
  return add != epilogue.end() && std::any_of(add, epilogue.end(), needs_input);
}

bool Recipe::saves_z() const {
  for (Stage stage : epilogue)
    if (needs_input(stage)) return true;
  return false;
}

const Recipe& recipe(const std::string& text) {
  static std::mutex mutex;
  static std::map<std::string, Recipe> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(text);
  return found != known.end() ? found->second : known.emplace(text, parse(text)).first->second;
}

}  // namespace fusedres
