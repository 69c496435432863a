/* Start of a Cortex-M on an MPS2 board in QEMU; the rest is newlib's, through semihosting. */
#include <stdint.h>

extern uint32_t stack_top[];
extern void _start(void);

void reset(void);
void reset(void) {
    *(volatile uint32_t *)0xe000ed88u |= 0xfu << 20; /* the FPU */
    __asm__ volatile("dsb\n isb");
    _start();
    for (;;) continue;
}
/* What newlib calls before and after main. */
void _init(void);
void _init(void) {}
void _fini(void);
void _fini(void) {}
static void fault(void) {
    for (;;) __asm__ volatile("bkpt 0");
}
__attribute__((section(".vectors"), used)) static void (*const vectors[16])(void) = {
    (void (*)(void))stack_top, reset, fault, fault, fault, fault, fault, 0, 0, 0, 0, fault, fault, 0, fault, fault};
