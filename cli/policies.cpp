// policies.cpp - from flags to policies. The table of policies in model.h says which flags each one takes.
#include "policies.h"

#include <charconv>
#include <sstream>

#include "report.h"

namespace speed {

std::string listed(const std::vector<std::string>& words, const std::string& conjunction) {
  std::string s;
  for (size_t i = 0; i < words.size(); ++i)
    s += (i == 0 ? "" : i + 1 < words.size() ? ", " : " " + conjunction + " ") + words[i];
  return s;
}

std::vector<std::string> policy_names() {
  std::vector<std::string> names;
  for (auto& p : policy_table) names.push_back(p.name);
  return names;
}

std::vector<int> read_ids(std::string text, const std::string& flag) {
  std::vector<int> ids;
  for (char& c : text)
    if (c == '\n' || c == '\t' || c == '\r') c = ' ';
  // Numbers, with blanks or one comma between them.
  bool comma = true;  // as before the first: a comma here would leave an empty place
  for (size_t at = 0; (at = text.find_first_not_of(' ', at)) != std::string::npos;) {
    if (text[at] == ',') {
      if (comma) throw Error(2, flag, "nothing stands before a comma", "give whole numbers, as 1,2,3");
      comma = true, ++at;
      continue;
    }
    const std::string word = text.substr(at, std::min(text.find_first_of(" ,", at), text.size()) - at);
    int id = 0;
    auto [p, e] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (e != std::errc() || p != word.data() + word.size() || id < 0)
      throw Error(2, flag, "\"" + word + "\" is no token id or layer", "give whole numbers, split by commas or spaces");
    ids.push_back(id);
    comma = false, at += word.size();
  }
  if (comma && !ids.empty()) throw Error(2, flag, "nothing follows the last comma", "give whole numbers, as 1,2,3");
  return ids;
}

Policy make_policy(const Options& o, const Model& model) {
  const Config& c = model.config;
  const bool has_weights = model.has_file();
  const int L = c.shape.n_layers;
  bool named = o.policy.has_value();
  Method method = named ? find_policy(*o.policy).value_or(Method::full) : Method::full;
  Policy p = full_depth(L);
  if (o.auto_k) {
    if (!c.tuned)
      throw Error(2, "--k auto", "no K was chosen for this file", "choose one: speed tune -m FILE -f TEXT --write");
    p.method = c.tuned->method, p.k = c.tuned->k, p.bos = c.tuned->bos;
    return p;
  }
  // --policy says which one. Else --k: the one method that the weights were trained for, or speed. Else --keep or
  // --every: share. Else the one policy at one K that the weights were trained for. Else full.
  std::optional<Method> trained;
  if (!c.adapted.empty() &&
      std::all_of(c.adapted.begin(), c.adapted.end(), [&](auto& a) { return a.method == c.adapted[0].method; }))
    trained = c.adapted[0].method;
  const Adaptation* one = c.adapted.size() == 1 && c.adapted[0].k ? &c.adapted[0] : nullptr;
  auto choose = [&](Method m) { method = m, named = true; };
  if (!named && o.k) choose(trained && info(*trained).takes_k ? *trained : Method::speed);
  if (!named && (o.keep || o.every)) choose(Method::share);
  if (!named && one && !info(one->method).takes_kept) choose(one->method);
  p.method = method;
  const PolicyInfo& takes = info(p.method);
  if (one && one->method == p.method) p.bos = one->bos;

  if (o.bos && !takes.takes_bos)
    throw Error(2, *o.bos ? "--bos" : "--no-bos", std::string("has no meaning under policy ") + name(p.method),
                "add --policy speed or --k K");
  if (o.k && !takes.takes_k)
    throw Error(2, "--k", std::string("policy ") + name(p.method) + " has no K",
                "leave it out, or choose --policy speed");
  if ((o.keep || o.every) && !takes.takes_kept)
    throw Error(2, o.keep ? "--keep" : "--every", std::string("has no meaning under policy ") + name(p.method),
                "add --policy share");
  if (o.group && !takes.takes_group)
    throw Error(2, "--group", std::string("has no meaning under policy ") + name(p.method), "add --policy swiftkv");
  if (o.k && *o.k > L)
    throw Error(2, "--k " + std::to_string(*o.k), "this model has " + std::to_string(L) + " layers",
                "use 1 to " + std::to_string(L));
  p.bos = o.bos.value_or(p.bos);

  switch (p.method) {  // the default K: the file's own, else what each paper proposes
    case Method::full: break;
    case Method::speed: p.k = o.k.value_or(one && one->method == Method::speed ? one->k : default_speed_k(L)); break;
    case Method::pop: p.k = o.k.value_or(L - L / 3); break;
    case Method::swiftkv:
      p.k = o.k.value_or(c.swiftkv_k ? c.swiftkv_k : std::max(1, 3 * L / 4));
      p.group = o.group.value_or(c.swiftkv_group);
      if (has_weights && p.k < L && !c.swiftkv_k)
        throw Error(2, "--policy swiftkv", "this model has no SwiftKV weights", "use --policy pop, which needs none");
      if (has_weights && p.k < L && p.k != c.swiftkv_k)
        throw Error(2, "--k " + std::to_string(p.k),
                    "this model's SwiftKV weights begin at layer " + std::to_string(c.swiftkv_k),
                    "use --k " + std::to_string(c.swiftkv_k));
      if (has_weights && o.group && *o.group != c.swiftkv_group)
        throw Error(2, "--group", "this model's is " + std::to_string(c.swiftkv_group), "leave it out");
      break;
    case Method::share: {
      if (!o.keep && !o.every)
        throw Error(2, "--policy share", "which layers keep a cache?", "add --keep 0,4,8 or --every 4");
      if (o.keep && o.every) throw Error(2, "--keep, --every", "both given", "use one of them");
      p.kept.assign(L, false);
      if (o.every)
        for (int l = 0; l < L; l += *o.every) p.kept[l] = true;
      else
        for (int l : read_ids(*o.keep, "--keep")) {
          if (l >= L)
            throw Error(2, "--keep", "layer " + std::to_string(l) + " of " + std::to_string(L),
                        "use 0 to " + std::to_string(L - 1));
          p.kept[l] = true;
        }
      if (!p.kept[0]) throw Error(2, "--keep", "layer 0 is missing", "every layer reads a cache below it, so keep 0");
      break;
    }
  }
  if (has_weights && !c.original_projections && !(p.method == Method::swiftkv && p.k == c.swiftkv_k))
    throw Error(2, std::string("--policy ") + name(p.method),
                "this file has SwiftKV projections only above layer " + std::to_string(c.swiftkv_k),
                "use --policy swiftkv");
  return p;
}

// The parts of a list, without blanks around them.
static std::vector<std::string> parts_of(const std::string& list) {
  std::vector<std::string> parts;
  std::istringstream in(list);
  for (std::string part; std::getline(in, part, ',');) {
    const size_t first = part.find_first_not_of(' '), last = part.find_last_not_of(' ');
    parts.push_back(first == std::string::npos ? "" : part.substr(first, last - first + 1));
  }
  return parts;
}

Options with_policy(const Options& o, const std::string& spec, const std::string& flag) {
  Options v = o;
  v.policy = v.keep = std::nullopt, v.k = v.every = std::nullopt, v.bos = std::nullopt, v.auto_k = false;
  std::istringstream in(spec);
  bool known = true;
  for (std::string word; std::getline(in, word, ':');) {
    int number = 0;
    const bool is_number =
        std::from_chars(word.data(), word.data() + word.size(), number).ptr == word.data() + word.size() && number > 0;
    if (!v.policy) v.policy = word;
    else if (word == "no-bos") v.bos = false;
    else if (!is_number) known = false;
    else if (const auto m = find_policy(*v.policy); m && info(*m).takes_kept) v.every = number;
    else v.k = number;
  }
  if (!known || !find_policy(v.policy.value_or("")))
    throw Error(2, flag, "\"" + spec + "\" is no policy",
                "write it as full, speed:24, speed:24:no-bos, pop:20 or share:4");
  return v;
}

std::vector<Policy> compared_policies(const Options& o, const Model& model) {
  std::vector<Policy> policies = {full_depth(model.config.shape.n_layers)};
  if (!o.compare || o.compare->empty()) {
    policies.push_back(make_policy(o, model));
  } else {
    for (const std::string& spec : parts_of(*o.compare))
      if (spec != "full") policies.push_back(make_policy(with_policy(o, spec, "--compare"), model));
  }
  return policies;
}

std::vector<int> read_numbers(const std::string& text, const std::string& flag) {
  const std::vector<int> numbers = read_ids(text, flag);
  for (int n : numbers)
    if (n > 1 << 20) throw Error(2, flag, std::to_string(n) + " is too large", "use at most 1048576");
  return numbers;
}

std::vector<Policy> listed_policies(const Options& o, const Model& model) {
  std::vector<Policy> all;
  const std::vector<int> ks = read_numbers(o.ks, "--k");
  for (int k : ks)
    if (k < 1) throw Error(2, "--k", "K is 1 or more", "use 1 to " + std::to_string(model.config.shape.n_layers));
  auto add = [&](Options one) {
    const std::optional<Method> method = one.policy ? find_policy(*one.policy) : std::nullopt;
    if (one.k || ks.empty() || (method && !info(*method).takes_k)) return all.push_back(make_policy(one, model));
    for (int k : ks) {
      one.k = k;
      all.push_back(make_policy(one, model));
    }
  };
  if (!o.policy && (!ks.empty() || o.keep || o.every)) add(o);
  if (!o.policy) return all;
  bool bos_taken = false, kept_taken = false, k_taken = false, group_taken = false;
  for (const std::string& spec : parts_of(*o.policy)) {
    Options one = with_policy(o, spec, "--policy");
    const PolicyInfo& takes = info(*find_policy(*one.policy));
    if (takes.takes_bos && !one.bos) one.bos = o.bos;
    if (takes.takes_kept && !one.every) one.every = o.every, one.keep = o.keep;
    if (!takes.takes_group) one.group = std::nullopt;
    bos_taken |= takes.takes_bos, kept_taken |= takes.takes_kept, k_taken |= takes.takes_k && !one.k;
    group_taken |= takes.takes_group;
    add(one);
  }
  for (auto [given, taken, flag] : {std::tuple{o.bos.has_value(), bos_taken, "--bos, --no-bos"},
                                    {o.keep || o.every, kept_taken, "--keep, --every"},
                                    {!ks.empty(), k_taken, "--k"},
                                    {o.group.has_value(), group_taken, "--group"}})
    if (given && !taken)
      throw Error(2, flag, "has no meaning for " + *o.policy, "leave it out, or add a policy that takes it");
  return all;
}

std::string describe(const Policy& p) {
  const PolicyInfo& has = info(p.method);
  std::ostringstream s;
  s << has.name;
  if (has.takes_kept) s << " " << std::count(p.kept.begin(), p.kept.end(), true) << "/" << p.n_layers;
  if (has.takes_k) s << " K=" << p.k;
  if (has.takes_bos && !p.bos) s << " no BoS";
  return s.str();
}

json bos_of(const Policy& p) { return info(p.method).takes_bos ? json(p.bos) : json(); }

bool adapted(const Policy& p, const Config& c) {
  const PolicyInfo& has = info(p.method);
  if (p.is_full() || !has.needs_training) return true;
  for (auto& a : c.adapted)
    if (a.method == p.method && (a.k == 0 || a.k == p.k) && (!has.takes_bos || a.bos == p.bos)) return true;
  return false;
}

void note_if_not_adapted(const std::vector<Policy>& policies, const Config& c) {
  std::string list;
  for (const Policy& p : policies)
    if (!adapted(p, c)) list += (list.empty() ? "" : ", ") + describe(p);
  if (!list.empty()) note("these weights were not trained for " + list + "; expect worse answers than at full depth");
}

}  // namespace speed
