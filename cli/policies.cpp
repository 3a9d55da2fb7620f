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
    if (c == ',' || c == '\n' || c == '\t' || c == '\r') c = ' ';
  std::istringstream in(text);
  for (std::string word; in >> word;) {
    int id = 0;
    auto [p, e] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (e != std::errc() || p != word.data() + word.size() || id < 0)
      throw Error(2, flag, "\"" + word + "\" is no token id or layer", "give whole numbers, split by commas or spaces");
    ids.push_back(id);
  }
  return ids;
}

Policy make_policy(const Options& o, const Model& model) {
  const Config& c = model.config;
  const bool has_weights = model.has_file();
  const int L = c.shape.n_layers;
  std::optional<Method> method = o.policy ? find_policy(*o.policy) : std::nullopt;
  Policy p = full_depth(L);
  // --policy says which one. Else --k: the one method that the weights were trained for, or speed. Else --keep or
  // --every: share. Else the one policy at one K that the weights were trained for. Else full.
  std::optional<Method> trained;
  if (!c.adapted.empty() &&
      std::all_of(c.adapted.begin(), c.adapted.end(), [&](auto& a) { return a.method == c.adapted[0].method; }))
    trained = c.adapted[0].method;
  const Adaptation* one = c.adapted.size() == 1 && c.adapted[0].k ? &c.adapted[0] : nullptr;
  if (!method && o.k) method = trained && info(*trained).takes_k ? *trained : Method::speed;
  if (!method && (o.keep || o.every)) method = Method::share;
  if (!method && one && !info(one->method).takes_kept) method = one->method;
  p.method = method.value_or(Method::full);
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
    case Method::speed:
      p.k = o.k.value_or(one && one->method == Method::speed ? one->k : std::max(1, 3 * L / 4));
      break;
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

// "speed:24:no-bos" -> the options that say so.
Options variant(const Options& o, const std::string& spec) {
  Options v = o;
  v.policy = v.keep = std::nullopt, v.k = v.every = std::nullopt, v.bos = std::nullopt;
  std::istringstream in(spec);
  for (std::string word; std::getline(in, word, ':');) {
    int number = 0;
    const bool is_number =
        std::from_chars(word.data(), word.data() + word.size(), number).ptr == word.data() + word.size() && number > 0;
    if (!v.policy) v.policy = word;
    else if (word == "no-bos") v.bos = false;
    else if (!is_number) v.policy = "";
    else if (const auto m = find_policy(*v.policy); m && info(*m).takes_kept) v.every = number;
    else v.k = number;
  }
  if (!find_policy(v.policy.value_or("")))
    throw Error(2, "--compare", "\"" + spec + "\" is no policy",
                "write it as speed:24, speed:24:no-bos, pop:20 or share:4");
  return v;
}

std::vector<Policy> compared_policies(const Options& o, const Model& model) {
  std::vector<Policy> policies = {full_depth(model.config.shape.n_layers)};
  if (!o.compare || o.compare->empty()) {
    policies.push_back(make_policy(o, model));
  } else {
    std::istringstream list(*o.compare);
    for (std::string spec; std::getline(list, spec, ',');)
      if (spec != "full") policies.push_back(make_policy(variant(o, spec), model));
  }
  return policies;
}

std::vector<int> read_numbers(const std::string& text, const std::string& flag) {
  const std::vector<int> numbers = read_ids(text, flag);
  for (int n : numbers)
    if (n > 1 << 20) throw Error(2, flag, std::to_string(n) + " is too large", "use at most 1048576");
  return numbers;
}

std::vector<Policy> bench_policies(const Options& o, const Model& model) {
  std::vector<Policy> all;
  std::istringstream list(o.policy.value_or(o.ks.empty() ? "full" : "full,speed"));
  for (std::string word; std::getline(list, word, ',');) {
    Options one = o;
    const std::optional<Method> method = find_policy(word);
    if (!method) throw Error(2, "--policy", "\"" + word + "\" is no policy", "use " + listed(policy_names(), "or"));
    one.policy = word;
    if (!info(*method).takes_bos) one.bos = std::nullopt;
    if (!info(*method).takes_kept) one.every = std::nullopt;
    std::vector<int> ks = read_numbers(o.ks, "--k");
    if (ks.empty() || !info(*method).takes_k) {
      all.push_back(make_policy(one, model));
    } else {
      for (int k : ks) {
        if (k < 1) throw Error(2, "--k", "K is 1 or more", "use 1 to " + std::to_string(model.config.shape.n_layers));
        one.k = k;
        all.push_back(make_policy(one, model));
      }
    }
  }
  return all;
}

std::string describe(const Policy& p) {
  const PolicyInfo& has = info(p.method);
  std::string s = has.name;
  if (has.takes_kept)
    s += " " + std::to_string(std::count(p.kept.begin(), p.kept.end(), true)) + "/" + std::to_string(p.n_layers);
  if (has.takes_k) s += " K=" + std::to_string(p.k);
  if (has.takes_bos && !p.bos) s += " no BoS";
  return s;
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
