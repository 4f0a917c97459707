// Stacks to switch between: on x86-64 by pushing what a function must preserve (swapcontext would
// ask the kernel for the signal mask each time), elsewhere by ucontext.
#pragma once

#include <cstdint>

#ifdef __x86_64__

namespace fusedres::emulator {

using Stack = void*;

// Saves this stack's pointer in *from and goes on where `to` was left.
extern "C" void fusedres_switch_stack(Stack* from, Stack to);
asm(R"(
.text
.weak fusedres_switch_stack
.hidden fusedres_switch_stack
.type fusedres_switch_stack, @function
fusedres_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fusedres_switch_stack, .-fusedres_switch_stack
)");

inline void switch_stack(Stack* from, Stack to) { fusedres_switch_stack(from, to); }

// A stack that starts in `entry`, which must not return.
inline Stack new_stack(Stack, char* begin, char* end, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>(end);
  *--top = 0;  // where entry would return to; also makes the stack 16-byte aligned at its call
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  (void)begin;
  return top;
}

}  // namespace fusedres::emulator

#else

#include <ucontext.h>

namespace fusedres::emulator {

using Stack = ucontext_t*;

inline void switch_stack(Stack* from, Stack to) {
  if (!*from) *from = new ucontext_t;
  swapcontext(*from, to);
}

// `old` is reused where there is one.
inline Stack new_stack(Stack old, char* begin, char* end, void (*entry)()) {
  Stack stack = old ? old : new ucontext_t;
  getcontext(stack);
  stack->uc_stack.ss_sp = begin;
  stack->uc_stack.ss_size = end - begin;
  makecontext(stack, entry, 0);
  return stack;
}

}  // namespace fusedres::emulator

#endif
