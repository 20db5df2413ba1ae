# Instruction sets of the CPU kernels, and the definitions by which at::vec picks its width. Each level's kernels are
# the object library tokcomp_cpu_<level>; sets tokcomp_cpu_levels.
#
# TOKCOMP_CPU_ARCH=dispatch compiles csrc/cpu for every level and links each into a module of its own, of which one is
# loaded (csrc/cpu_level.h). Modules and not one library: templates of the standard library and of torch, and their
# static initialisers, are compiled at every level under the same names, of which a linker keeps any one for all.
set(flags_generic "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(x86 TRUE)
  set(flags_native -march=native)
  set(flags_avx2 -mavx2 -mfma -mf16c)
  set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
  set(flags_avx512_bf16 ${flags_avx512} -mavx512bf16 -mavx512vnni)
else()
  set(flags_native -mcpu=native)
endif()

if(NOT TOKCOMP_CPU_ARCH MATCHES "^(native|dispatch|avx512_bf16|avx512|avx2|generic)$")
  message(FATAL_ERROR "tokcomp: TOKCOMP_CPU_ARCH must be native, dispatch, avx512_bf16, avx512, avx2 or generic, "
                      "got ${TOKCOMP_CPU_ARCH}")
elseif(TOKCOMP_CPU_ARCH MATCHES "^avx" AND NOT x86)
  message(FATAL_ERROR "tokcomp: TOKCOMP_CPU_ARCH=${TOKCOMP_CPU_ARCH} needs an x86-64 machine, "
                      "got ${CMAKE_SYSTEM_PROCESSOR}")
endif()

# The kernels at one level, at::vec as wide as its CPU_CAPABILITY says: bfloat16 products are AVX512's own.
function(tokcomp_add_cpu_level level flags)
  string(TOUPPER "${level}" capability)
  string(REPLACE "_BF16" "" capability "${capability}")
  add_library(tokcomp_cpu_${level} OBJECT ${cpu_sources})
  target_include_directories(tokcomp_cpu_${level} PRIVATE csrc)
  target_link_libraries(tokcomp_cpu_${level} PRIVATE tokcomp_torch)
  target_compile_options(tokcomp_cpu_${level} PRIVATE ${cxx_flags} ${flags})
  target_compile_definitions(tokcomp_cpu_${level} PRIVATE
    CPU_CAPABILITY=${capability} CPU_CAPABILITY_${capability})
  # Most of a file's compilation is torch's headers: eight files share them, and must not use one name for two things.
  set_target_properties(tokcomp_cpu_${level} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 8)
endfunction()

set(tokcomp_cpu_features "")
if(TOKCOMP_CPU_ARCH STREQUAL "dispatch" AND x86 AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
  set(tokcomp_cpu_dispatch ON)
  set(tokcomp_cpu_levels default avx2 avx512 avx512_bf16)
  set(flags_default ${flags_generic})
  # Tiles are no level: whether there are any is asked before their instructions are reached (csrc/cpu/tiles.h).
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag("-mamx-tile -mamx-bf16 -mamx-int8" tokcomp_knows_tiles)
  if(tokcomp_knows_tiles)
    list(APPEND flags_avx512_bf16 -mamx-tile -mamx-bf16 -mamx-int8)
  endif()
  foreach(level IN LISTS tokcomp_cpu_levels)
    tokcomp_add_cpu_level(${level} "${flags_${level}}")
  endforeach()
  list(JOIN tokcomp_cpu_levels ", " names)
  message(STATUS "tokcomp: CPU kernels for dispatch (${names})")
  return()
endif()

# One level. Elsewhere than on x86-64 Linux what every CPU of the kind has is one level too.
set(tokcomp_cpu_dispatch OFF)
set(flags_dispatch ${flags_generic})
set(cpu_flags ${flags_${TOKCOMP_CPU_ARCH}})

# What the compiler may use under these flags: a machine that lacks any of it must not load the kernels.
file(WRITE "${CMAKE_BINARY_DIR}/isa.cpp" "")
execute_process(COMMAND ${CMAKE_CXX_COMPILER} ${cpu_flags} -dM -E "${CMAKE_BINARY_DIR}/isa.cpp"
                OUTPUT_VARIABLE macros ERROR_VARIABLE error RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "tokcomp: ${CMAKE_CXX_COMPILER} refuses ${cpu_flags}: ${error}")
endif()

# Macro of the compiler : flag in /proc/cpuinfo.
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

set(tokcomp_cpu_levels default)
if(macros MATCHES "__AVX512F__ " AND macros MATCHES "__AVX512BW__ " AND macros MATCHES "__AVX512VL__ "
   AND macros MATCHES "__AVX512DQ__ " AND macros MATCHES "__FMA__ ")
  set(tokcomp_cpu_levels avx512)
  if(macros MATCHES "__AVX512BF16__ ")
    set(tokcomp_cpu_levels avx512_bf16)
  endif()
elseif(macros MATCHES "__AVX2__ " AND macros MATCHES "__FMA__ " AND macros MATCHES "__F16C__ ")
  set(tokcomp_cpu_levels avx2)
endif()
tokcomp_add_cpu_level(${tokcomp_cpu_levels} "${cpu_flags}")
message(STATUS "tokcomp: CPU kernels for ${TOKCOMP_CPU_ARCH} (${tokcomp_cpu_levels})")
