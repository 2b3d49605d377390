// What stands for the toolkit's cuda_runtime.h on the host?
#pragma once
#include "../cuda_on_cpu.h"

#include <math.h>
