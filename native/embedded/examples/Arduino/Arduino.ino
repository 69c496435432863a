// Learns the samples that came with the export, a step in every turn of loop(), and says how many it knows.
#include <InstantFT.h>
#include "../../include/instantft_data.h"

alignas(16) static uint8_t arena[INSTANTFT_ARENA];
static instantft *tuner;

static void ask(const char *when) {
  int right = 0;
  for (int i = 0; i < INSTANTFT_DATA; i++)
    right += instantft_infer(tuner, instantft_data_x + (size_t)i * INSTANTFT_N, nullptr) == instantft_data_y[i];
  Serial.print(when);
  Serial.println(right);
}

void setup() {
  Serial.begin(115200);
  tuner = instantft_init(arena, sizeof arena);
  ask("right before: ");
  for (int i = 0; i < INSTANTFT_DATA; i++)
    if (instantft_add_sample(tuner, instantft_data_x + (size_t)i * INSTANTFT_N, instantft_data_y[i])) break;
}

void loop() {
  static bool done = false;
  if (done || instantft_train(tuner, 1) == INSTANTFT_MORE) return;
  instantft_commit(tuner);
  ask("right after: ");
  done = true;
}
