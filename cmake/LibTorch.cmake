# libtokcomp: the operators for C++ programs without Python. The schemas, which Python otherwise registers, are generated
# from the same table; the compiled kernels own every operator.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(schemas "${CMAKE_BINARY_DIR}/schemas.cpp")
add_custom_command(OUTPUT "${schemas}"
  COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/tokcomp_kernels/_schema.py" > "${schemas}"
  DEPENDS tokcomp_kernels/_schema.py VERBATIM)

file(GLOB libtorch_sources CONFIGURE_DEPENDS csrc/libtorch/*.cpp)
add_library(tokcomp SHARED "${schemas}" ${libtorch_sources})
add_library(tokcomp::tokcomp ALIAS tokcomp)
tokcomp_add_kernels(tokcomp libtokcomp_cpu_)
target_compile_definitions(tokcomp PRIVATE TOKCOMP_OWN_CUDA_KEY)
# The operators register themselves as the library is loaded; a program names none of its symbols.
target_link_options(tokcomp INTERFACE $<$<PLATFORM_ID:Linux>:LINKER:--no-as-needed>)
set_target_properties(tokcomp PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}
  INSTALL_RPATH_USE_LINK_PATH ON)
if(tokcomp_cpu_dispatch)
  list(TRANSFORM tokcomp_cpu_levels PREPEND tokcomp_ OUTPUT_VARIABLE modules)
  set_target_properties(${modules} PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)
  install(TARGETS ${modules} LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
endif()

# tokcomp::torch, for programs: the torch that libtokcomp was built with and fits. Torch's own CMake package demands a
# whole CUDA toolkit. libtorch.so brings torch's CUDA half along, and AOTInductor's packages ask for it by name.
add_library(tokcomp_program INTERFACE)
set_target_properties(tokcomp_program PROPERTIES EXPORT_NAME torch)
# $<1:...>: CMake refuses to install a path below the sources, where .venv may be, unless it begins with an expression.
target_include_directories(tokcomp_program SYSTEM INTERFACE "$<1:${include_main}>" "$<1:${include_api}>")
target_compile_definitions(tokcomp_program INTERFACE _GLIBCXX_USE_CXX11_ABI=${tokcomp_torch_cxx11_abi})
target_compile_features(tokcomp_program INTERFACE cxx_std_20)
foreach(library torch torch_cpu c10)
  target_link_libraries(tokcomp_program INTERFACE "${tokcomp_torch_lib}/lib${library}${CMAKE_SHARED_LIBRARY_SUFFIX}")
endforeach()

install(TARGETS tokcomp tokcomp_program EXPORT tokcompTargets)
install(EXPORT tokcompTargets NAMESPACE tokcomp:: DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/tokcomp")
file(WRITE "${CMAKE_BINARY_DIR}/tokcompConfig.cmake"
     "include(\"\${CMAKE_CURRENT_LIST_DIR}/tokcompTargets.cmake\")\n")
write_basic_package_version_file("${CMAKE_BINARY_DIR}/tokcompConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_BINARY_DIR}/tokcompConfig.cmake" "${CMAKE_BINARY_DIR}/tokcompConfigVersion.cmake"
        DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/tokcomp")

include(CTest)
if(BUILD_TESTING)
  add_executable(tokcomp_test csrc/tests/test_operators.cpp)
  target_link_libraries(tokcomp_test PRIVATE tokcomp tokcomp_torch)
  if(tokcomp_cuda)
    # Tensors on a GPU need torch's CUDA half, which nothing here names either.
    target_link_libraries(tokcomp_test PRIVATE "${tokcomp_torch_lib}/libtorch_cuda.so")
  endif()
  add_test(NAME operators COMMAND tokcomp_test)
endif()
