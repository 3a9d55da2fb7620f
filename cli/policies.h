// policies.h - from flags to policies, and from policies to the words that tables show.
#pragma once

#include <string>
#include <vector>

#include "../base/json.h"
#include "options.h"

namespace speed {

// The policy that the flags ask for. Throws Error 2 for what this model cannot run; a model that is only a shape can
// run every policy.
Policy make_policy(const Options& o, const Model& model);

// The options that an entry of a list such as "speed:24:no-bos" stands for. What it leaves open is open in them too.
// `flag` is named where it is no policy.
Options with_policy(const Options& o, const std::string& spec, const std::string& flag);

// The K of speed where neither the user nor the file says one.
inline int default_speed_k(int n_layers) { return (4 * n_layers + 4) / 5; }

// Full depth, and the policies of --compare, or, where its list is empty, the one the policy flags name.
std::vector<Policy> compared_policies(const Options& o, const Model& model);

// bench, plan: the policies of --policy; one without a K of its own with every K of --k, where it takes one. Nothing
// where there is no --policy and no --k.
std::vector<Policy> listed_policies(const Options& o, const Model& model);

// "speed K=24 no BoS", "share 8/32".
std::string describe(const Policy& p);

// Of a policy that has an anchor, whether it is used; else null.
json bos_of(const Policy& p);

// True if the weights were trained for this policy, or it needs no training.
bool adapted(const Policy& p, const Config& c);

// Says so, once, where they are not.
void note_if_not_adapted(const std::vector<Policy>& policies, const Config& c);

// The names of all policies; words as "a, b or c".
std::vector<std::string> policy_names();
std::string listed(const std::vector<std::string>& words, const std::string& conjunction);

// The numbers of a list such as "1,2,3"; `flag` is named where it is none.
std::vector<int> read_ids(std::string text, const std::string& flag);
std::vector<int> read_numbers(const std::string& text, const std::string& flag);

}  // namespace speed
