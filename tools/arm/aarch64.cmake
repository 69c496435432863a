# Debian's cross compilers for aarch64.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# Debian's Python.h includes <aarch64-linux-gnu/python3.X/pyconfig.h>.
get_filename_component(sysroot "${CMAKE_CURRENT_LIST_DIR}/../../build/arm/sysroot" ABSOLUTE)
set(CMAKE_CXX_FLAGS_INIT "-idirafter \"${sysroot}/usr/include\"")
