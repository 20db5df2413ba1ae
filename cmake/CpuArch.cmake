# Instruction set of the CPU kernels, and the definitions by which at::vec picks its width.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(x86 TRUE)
  set(flags_native -march=native)
  set(flags_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c)
  set(flags_avx2 -mavx2 -mfma -mf16c)
else()
  set(flags_native -mcpu=native)
endif()
set(flags_generic "")

if(NOT TOKCOMP_CPU_ARCH MATCHES "^(native|avx512|avx2|generic)$")
  message(FATAL_ERROR "tokcomp: TOKCOMP_CPU_ARCH must be native, avx512, avx2 or generic, got ${TOKCOMP_CPU_ARCH}")
elseif(TOKCOMP_CPU_ARCH MATCHES "^avx" AND NOT x86)
  message(FATAL_ERROR "tokcomp: TOKCOMP_CPU_ARCH=${TOKCOMP_CPU_ARCH} needs an x86-64 machine, "
                      "got ${CMAKE_SYSTEM_PROCESSOR}")
endif()
set(cpu_flags ${flags_${TOKCOMP_CPU_ARCH}})

# What the compiler may use under these flags: a machine that lacks any of it must not load the kernels.
file(WRITE "${CMAKE_BINARY_DIR}/isa.cpp" "")
execute_process(COMMAND ${CMAKE_CXX_COMPILER} ${cpu_flags} -dM -E "${CMAKE_BINARY_DIR}/isa.cpp"
                OUTPUT_VARIABLE macros ERROR_VARIABLE error RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "tokcomp: ${CMAKE_CXX_COMPILER} refuses ${cpu_flags}: ${error}")
endif()

# Macro of the compiler : flag in /proc/cpuinfo.
set(tokcomp_cpu_features "")
foreach(pair SSE4_2:sse4_2 AVX:avx AVX2:avx2 FMA:fma F16C:f16c BMI:bmi1 BMI2:bmi2 LZCNT:abm MOVBE:movbe
             AVX512F:avx512f AVX512BW:avx512bw AVX512VL:avx512vl AVX512DQ:avx512dq AVX512CD:avx512cd
             AVX512IFMA:avx512ifma AVX512VBMI:avx512vbmi AVX512VBMI2:avx512_vbmi2 AVX512VNNI:avx512_vnni
             AVX512BITALG:avx512_bitalg AVX512VPOPCNTDQ:avx512_vpopcntdq AVX512BF16:avx512_bf16
             AVX512FP16:avx512_fp16 AVX512VP2INTERSECT:avx512_vp2intersect AVXVNNI:avx_vnni GFNI:gfni VAES:vaes
             VPCLMULQDQ:vpclmulqdq ADX:adx SSE4A:sse4a AMX_TILE:amx_tile AMX_BF16:amx_bf16 AMX_INT8:amx_int8)
  string(REPLACE ":" ";" pair ${pair})
  list(GET pair 0 macro)
  list(GET pair 1 feature)
  if(macros MATCHES "#define __${macro}__ ")
    list(APPEND tokcomp_cpu_features ${feature})
  endif()
endforeach()

set(capability DEFAULT)
if(macros MATCHES "__AVX512F__ " AND macros MATCHES "__AVX512BW__ " AND macros MATCHES "__AVX512VL__ "
   AND macros MATCHES "__AVX512DQ__ " AND macros MATCHES "__FMA__ ")
  set(capability AVX512)
elseif(macros MATCHES "__AVX2__ " AND macros MATCHES "__FMA__ " AND macros MATCHES "__F16C__ ")
  set(capability AVX2)
endif()
set(tokcomp_cpu_capability ${capability})
message(STATUS "tokcomp: CPU kernels for ${TOKCOMP_CPU_ARCH} (${capability})")

add_library(tokcomp_cpu_flags INTERFACE)
target_compile_options(tokcomp_cpu_flags INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${cpu_flags}>")
target_compile_definitions(tokcomp_cpu_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:CPU_CAPABILITY=${capability}> $<$<COMPILE_LANGUAGE:CXX>:CPU_CAPABILITY_${capability}>)
