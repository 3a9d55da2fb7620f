// program.h - everything around the method: the command line, its modes and reports.
//
// `make` compiles each file of cli/ on its own, so that a change is compiled in seconds. A compiler that is given
// speed.cu alone gets all of them here.
#pragma once

namespace speed {

// Runs the command line; returns the exit code.
int program(int argc, char** argv);

}  // namespace speed

#ifndef SPEED_SEPARATE
#include "bench.cpp"
#include "chat.cpp"
#include "generate.cpp"
#include "info.cpp"
#include "lines.cpp"
#include "logits.cpp"
#include "options.cpp"
#include "perplexity.cpp"
#include "plan.cpp"
#include "policies.cpp"
#include "program.cpp"
#include "report.cpp"
#include "request.cpp"
#include "tokenize.cpp"
#include "trace.cpp"
#include "trace_document.cpp"
#include "trace_html.cpp"
#include "tune.cpp"
#endif
