# TOKCOMP_SANITIZE=address,undefined or thread: the kernels under GCC's sanitizers, as `make attack` runs them. With them
# csrc/tests/sanitizer_probe.cpp is compiled, whose operators do what each must report.
#
# Python and torch are not instrumented, so the sanitizer's runtime has to be there before them: preload.txt names what
# LD_PRELOAD takes, the runtime and the C++ library, whose functions for exceptions it wraps.
if(NOT TOKCOMP_SANITIZE MATCHES "^(address,undefined|thread)$")
  message(FATAL_ERROR "tokcomp: TOKCOMP_SANITIZE must be address,undefined or thread, got ${TOKCOMP_SANITIZE}")
elseif(tokcomp_cuda OR NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  message(FATAL_ERROR "tokcomp: TOKCOMP_SANITIZE must have GCC and TOKCOMP_BUILD_CUDA=0, got ${CMAKE_CXX_COMPILER}")
endif()

string(REGEX MATCH "address|thread" sanitizer "${TOKCOMP_SANITIZE}")
string(REGEX REPLACE "(.).*" "lib\\1san.so" runtime "${sanitizer}")
set(preload "")
foreach(library ${runtime} libstdc++.so.6)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=${library}
                  OUTPUT_VARIABLE path OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT EXISTS "${path}")
    message(FATAL_ERROR "tokcomp: TOKCOMP_SANITIZE=${TOKCOMP_SANITIZE} must have ${library}, got a "
                        "${CMAKE_CXX_COMPILER} without it; install the compiler's sanitizer runtimes")
  endif()
  list(APPEND preload "${path}")
endforeach()
list(JOIN preload ":" preload)
file(WRITE "${CMAKE_BINARY_DIR}/preload.txt" "${preload}\n")

# Line numbers for the reports. vptr would ask for type information that torch's libraries hide.
set(CMAKE_CXX_FLAGS_RELEASE "-O1 -g1 -DNDEBUG")
add_compile_options(-fsanitize=${TOKCOMP_SANITIZE} -fno-sanitize=vptr -fno-sanitize-recover=all
                    -fno-omit-frame-pointer)
add_link_options(-fsanitize=${TOKCOMP_SANITIZE})
if(sanitizer STREQUAL "thread")
  include_directories(BEFORE csrc/tests/thread_shim)
endif()
