// Only a name: the emulator runs bfloat16.
#pragma once
struct __half {};
