/* Arduino looks for headers of a library here. */
#include "../include/instantft_device.h"
