# tokcomp_kernels/_C: the kernels, and what was built (csrc/bindings.cpp). Loading it registers the kernels.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

list(JOIN tokcomp_cpu_features " " cpu_features)
list(JOIN tokcomp_cpu_levels "\", \"" cpu_levels)
if(tokcomp_cuda)
  set(build_cuda "\"${nvcc_release}\"")
  string(REGEX REPLACE "[ ,;]+" "\", \"" arch_names "${TORCH_CUDA_ARCH_LIST}")
  set(build_archs "[\"${arch_names}\"]")
else()
  set(build_cuda null)
  set(build_archs "[]")
endif()
set(build_torch_cuda null)
if(tokcomp_torch_cuda)
  set(build_torch_cuda "\"${tokcomp_torch_cuda}\"")
endif()
set(schemas "${PROJECT_SOURCE_DIR}/tokcomp_kernels/_schema.py")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${schemas}")
execute_process(COMMAND "${Python_EXECUTABLE}" "${schemas}" --digest OUTPUT_VARIABLE build_schemas COMMAND_ERROR_IS_FATAL ANY)
# One text, twice used: compiled into the module, and beside it so that Python can decide whether to load it at all.
configure_file(cmake/build_info.json.in build_info.json @ONLY)
file(READ "${CMAKE_BINARY_DIR}/build_info.json" build_info)
file(CONFIGURE OUTPUT build_info.h CONTENT "constexpr const char* kBuildInfo = R\"json(@build_info@)json\";\n" @ONLY)

python_add_library(_C MODULE WITH_SOABI csrc/bindings.cpp csrc/python_keys.cpp)
tokcomp_add_kernels(_C _C.${Python_SOABI}.)
target_include_directories(_C PRIVATE "${CMAKE_BINARY_DIR}")
if(TOKCOMP_SANITIZE)
  target_sources(_C PRIVATE csrc/tests/sanitizer_probe.cpp)
endif()
set(libraries _C)
if(tokcomp_cpu_dispatch)
  list(TRANSFORM tokcomp_cpu_levels PREPEND _C_ OUTPUT_VARIABLE modules)
  list(APPEND libraries ${modules})
endif()
# No RPATH: torch is imported first, so its libraries are there, and the module may move.
set_target_properties(${libraries} PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${TOKCOMP_OUTPUT_DIR}" SKIP_BUILD_RPATH ON)

set(beside "${TOKCOMP_OUTPUT_DIR}/_C.${Python_SOABI}")
add_custom_command(TARGET _C POST_BUILD
  COMMAND "${CMAKE_COMMAND}" -E copy "${CMAKE_BINARY_DIR}/build_info.json" "${beside}.json"
  COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/cmake/join_logs.py" "${beside}.ptxas.txt"
          "$<FILTER:$<TARGET_OBJECTS:_C>,INCLUDE,[.]cu[.]o$>"
  COMMAND_EXPAND_LISTS VERBATIM)
