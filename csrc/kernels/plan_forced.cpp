#include "plan_forced.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <string_view>
#include <vector>

namespace entrgi {
namespace {

constexpr const char* kVariable = "ENTRGI_FORCE_PLAN";

[[noreturn]] void refuse(std::string_view piece, const std::string& expected) {
  throw std::invalid_argument(std::string(kVariable) + ": expected " + expected + ", got '" +
                              std::string(piece) + "'");
}

std::string_view trimmed(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t\n");
  if (first == text.npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\n") - first + 1);
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    parts.push_back(trimmed(text.substr(begin, end - begin)));
    begin = end + 1;
  }
  return parts;
}

// "operator:fields" or "field=value" as its two halves.
std::pair<std::string_view, std::string_view> halves(std::string_view piece, char separator,
                                                     const std::string& expected) {
  const size_t middle = piece.find(separator);
  if (middle == piece.npos) refuse(piece, expected);
  return {trimmed(piece.substr(0, middle)), trimmed(piece.substr(middle + 1))};
}

void append(std::string& names, const char* name) {
  if (!names.empty()) names += ", ";
  names += name;
}

template <typename Values>
std::string list(const Values& values) {
  std::string names;
  for (const auto value : values) append(names, name_of(value));
  return names;
}

Op parse_op(std::string_view name) {
  for (const Op op : kOps) {
    if (name == name_of(op)) return op;
  }
  refuse(name, "an operator (" + list(kOps) + ")");
}

void parse(std::string_view, std::string_view value, std::string& kernel) {
  for (const Kernel known : kKernels) {
    if (value == name_of(known)) kernel = value;
  }
  if (kernel != value || value.empty()) refuse(value, "a kernel (" + list(kKernels) + ")");
}

template <typename Integer>
void parse(std::string_view field, std::string_view value, Integer& number) {
  const char* end = value.data() + value.size();
  const auto [stop, error] = std::from_chars(value.data(), end, number);
  if (error != std::errc() || stop != end || number < 1) {
    refuse(value, "a whole number >= 1 for " + std::string(field));
  }
}

PlanOverrides parse_fields(std::string_view fields) {
  PlanOverrides overrides;
  std::set<std::string_view> seen;
  for (const std::string_view piece : split(fields, ',')) {
    const auto [field, value] = halves(piece, '=', "field=value");
    bool known = false;
    std::string names;
    const auto fill = [&, field = field, value = value](const char* name, auto& member) {
      append(names, name);
      if (field != name) return;
      known = true;
      parse(field, value, member);
    };
    visit_fields(fill, overrides);
    if (!known) refuse(field, "a field (" + names + ")");
    if (!seen.insert(field).second) refuse(fields, "the field " + std::string(field) + " once");
  }
  return overrides;
}

}  // namespace

ForcedPlans parse_forced_plans(const std::string& text) {
  ForcedPlans plans;
  if (trimmed(text).empty()) return plans;
  for (const std::string_view piece : split(text, ';')) {
    const auto [name, fields] = halves(piece, ':', "operator:field=value,...");
    const Op op = parse_op(name);
    if (!plans.emplace(op, parse_fields(fields)).second) {
      refuse(text, "the operator " + std::string(name) + " once");
    }
  }
  return plans;
}

const ForcedPlans& forced_plans() {
  static const ForcedPlans plans = [] {
    const char* text = std::getenv(kVariable);
    return parse_forced_plans(text == nullptr ? "" : text);
  }();
  return plans;
}

Plan make_forced_plan(Op op, const Shape& shape, const Device& device, const PlanOverrides& given) {
  const ForcedPlans& plans = forced_plans();
  const auto forced = plans.find(op);
  if (forced == plans.end()) return make_plan(op, shape, device, given);
  PlanOverrides merged = given;
  const auto fill = [](const char*, auto& chosen, const auto& base) {
    if (chosen == std::decay_t<decltype(chosen)>{}) chosen = base;
  };
  visit_fields(fill, merged, forced->second);
  try {
    return make_plan(op, shape, device, merged);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string(error.what()) + " (" + kVariable + " forces a plan of " +
                                name_of(op) + ")");
  }
}

}  // namespace entrgi
