#define CATCH_CONFIG_MAIN
#include "helpers.h"

template class speed::Engine<speed::Cpu>;  // for all tests
