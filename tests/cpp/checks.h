// What the C++ tests check with, and how they are run and reported.
#pragma once

#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cases.h"

namespace checks {

inline std::string context;  // what is being looked at
inline int failures = 0;
inline bool large = false;  // all cases, not only a choice of these

inline void check(bool holds, const std::string& what) {
  if (holds) return;
  if (++failures <= 20) std::printf("  FAILED [%s] %s\n", context.c_str(), what.c_str());
}

template <class Exception>
void check_throws(const std::function<void()>& call, const std::string& what) {
  try {
    call();
  } catch (const Exception&) {
    return;
  }
  check(false, what + " was not thrown");
}

// An error that must stay below a bound, and the worst of it seen.
struct Bounded {
  const char* what;
  double bound;
  double worst = 0;

  void see(double error) {
    worst = std::max(worst, error);
    check(error <= bound, std::string(what) + " errs by " + std::to_string(error));
  }
};

inline bool identical(const pyels::Partial& a, const pyels::Partial& b) {
  return a.m == b.m && a.s == b.s && a.y == b.y && a.e == b.e && a.top == b.top && a.source == b.source &&
         a.ss == b.ss && a.sy == b.sy && a.yy == b.yy && a.chance == b.chance;
}

inline void on_every_isa(const std::string& what, const std::function<void()>& body) {
  for (const char* isa : pyels::available_isas()) {
    cases::use_isa(isa);
    context = what + " on " + isa;
    body();
  }
}

struct Test {
  const char* name;
  void (*body)();
  bool only_large = false;
};

// The main function of a test program. Runs and reports the tests whose names hold the word given, or all.
//
//     PROGRAM [--large] [NAME-PART]     --large: with all cases, and the tests that take long; else a choice of these
//     PROGRAM --list
inline int run_tests(int count, char** arguments, const std::vector<Test>& tests, void (*report)() = nullptr) {
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  std::string part;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--list") {
      for (const Test& test : tests) std::printf("%s%s\n", test.name, test.only_large ? " (large)" : "");
      return 0;
    }
    if (argument == "--large")
      large = true;
    else if (part.empty() && argument[0] != '-')
      part = argument;
    else
      return std::fprintf(stderr, "usage: %s [--list] [--large] [NAME-PART]\n", arguments[0]), 2;
  }
  std::printf("instruction sets:");
  for (const char* isa : pyels::available_isas()) std::printf(" %s", isa);
  std::printf("\n");
  int passed = 0, failed = 0;
  for (const Test& test : tests) {
    if (std::string(test.name).find(part) == std::string::npos || (test.only_large && !large)) continue;
    const int failures_before = failures;
    const auto start = std::chrono::steady_clock::now();
    try {
      test.body();
    } catch (const std::exception& error) {
      check(false, std::string("exception: ") + error.what());
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s  %s (%.1f s)\n", failures == failures_before ? "ok    " : "FAILED", test.name, seconds.count());
    ++(failures == failures_before ? passed : failed);
  }
  if (passed + failed == 0) return std::fprintf(stderr, "no test of that name; see --list\n"), 2;
  if (report) report();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

}  // namespace checks
