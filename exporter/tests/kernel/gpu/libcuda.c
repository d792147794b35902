// SPDX-License-Identifier: Apache-2.0
// Stands in for libcuda.so.1: its functions begin with the bytes of NVIDIA's driver (seen in 535 and 550),
// `cmpl $0x321cba00, state(%rip); je; jmp *pointer(%rip)`, and sleep or compute for as many microseconds as they are told.
#include <stdint.h>
#include <time.h>
#include <unistd.h>

__attribute__((visibility("hidden"))) uint32_t cuda_state = 1;
__attribute__((visibility("hidden"))) int work(long computes, long sleeps);

int work(long computes, long sleeps) {
  if (computes > 0) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    long until = now.tv_sec * 1000000000L + now.tv_nsec + computes * 1000;
    do clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    while (now.tv_sec * 1000000000L + now.tv_nsec < until);
  }
  if (sleeps > 0) usleep(sleeps);
  return 0;
}

__attribute__((visibility("hidden"), used)) int (*cuda_work)(long, long) = work;

// The distance of the `je` is a byte: 74 06, over the jump.
#define STUB(name)                                                                                                        \
  __asm__(".text\n.p2align 4\n.globl " #name "\n.type " #name ", @function\n" #name ":\n"                                 \
          "  cmpl $0x321cba00, cuda_state(%rip)\n  je 1f\n  jmp *cuda_work(%rip)\n1:\n  mov $999, %eax\n  ret\n.size " #name \
          ", .-" #name "\n")
#define BEGINS(name, bytes)                                                                                               \
  __asm__(".text\n.p2align 4\n.globl " #name "\n.type " #name ", @function\n" #name ":\n  " bytes                          \
          "\n  jmp *cuda_work(%rip)\n.size " #name ", .-" #name "\n")

STUB(cuLaunchKernel);
STUB(cuLaunchKernelEx);
STUB(cuStreamSynchronize);
STUB(cuGraphLaunch);
STUB(cuMemcpyHtoD_v2);
// An alias: one place by two names.
__asm__(".globl cuLaunchKernel_ptsz\n.type cuLaunchKernel_ptsz, @function\n.set cuLaunchKernel_ptsz, cuLaunchKernel\n");
// As a compiler begins them.
BEGINS(cuEventSynchronize, "endbr64\n  push %rbx\n  pop %rbx");
// Single-stepped by a uprobe, and one where it is never installed.
BEGINS(cuCtxSynchronize, "mov %rdi, %rax");
BEGINS(cuMemcpyDtoH_v2, "lock incl cuda_state(%rip)");
