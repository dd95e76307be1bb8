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
};

// Runs and reports; the number of tests that failed.
inline int run_tests(const std::vector<Test>& tests) {
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  std::printf("instruction sets:");
  for (const char* isa : pyels::available_isas()) std::printf(" %s", isa);
  std::printf("\n");
  int failed = 0;
  for (const Test& test : tests) {
    const int failures_before = failures;
    const auto start = std::chrono::steady_clock::now();
    try {
      test.body();
    } catch (const std::exception& error) {
      check(false, std::string("exception: ") + error.what());
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s  %s (%.1f s)\n", failures == failures_before ? "ok    " : "FAILED", test.name, seconds.count());
    failed += failures != failures_before;
  }
  std::printf("%d passed, %d failed\n", static_cast<int>(tests.size()) - failed, failed);
  return failed;
}

}  // namespace checks
