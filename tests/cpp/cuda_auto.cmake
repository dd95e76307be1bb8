# PYELS_CUDA=AUTO looks for a CUDA compiler where there is a driver; ON does anyhow. Called as
# cmake -D SOURCE=.. -P cuda_auto.cmake, with programs that stand for driver and compiler.
set(folder ${CMAKE_CURRENT_BINARY_DIR}/cuda_auto)

function(program name text)
  file(WRITE ${folder}/${name} "#!/bin/sh\n${text}\n")
  file(CHMOD ${folder}/${name} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
endfunction()

# Configures with PYELS_CUDA=mode, and the further definitions; says in `said` what that printed, in `asked` whether the
# compiler was called.
macro(configure mode)
  file(REMOVE_RECURSE ${folder}/build ${folder}/asked)
  execute_process(
    COMMAND ${CMAKE_COMMAND} -E env CUDACXX=${folder}/nvcc ${CMAKE_COMMAND} -S ${SOURCE} -B ${folder}/build
            -D PYELS_PYTHON=OFF -D PYELS_CUDA=${mode} ${ARGN}
    OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE status)
  string(REGEX REPLACE "[ \n]+" " " said "${said}")
  set(asked FALSE)
  if(EXISTS ${folder}/asked)
    set(asked TRUE)
  endif()
endmacro()

function(expect what)
  if(NOT (${ARGN}))
    message(FATAL_ERROR "${what}: status ${status}, compiler asked: ${asked}\n${said}")
  endif()
endfunction()

program(nvcc "echo asked >> ${folder}/asked; exit 1")
program(nvidia-smi "exit 0")

configure(AUTO -D nvidia_smi=${folder}/nvidia-smi)
expect("AUTO with a driver" asked AND status EQUAL 0 AND said MATCHES "CUDA engine: left out")
configure(ON)
expect("ON without a compiler" asked AND NOT status EQUAL 0 AND said MATCHES "PYELS_CUDA=ON, but no CUDA compiler of version 12")
configure(OFF -D nvidia_smi=${folder}/nvidia-smi)
expect("OFF" NOT asked AND status EQUAL 0 AND said MATCHES "CUDA engine: left out")
if(NOT EXISTS /dev/nvidiactl AND NOT EXISTS /proc/driver/nvidia/version)
  configure(AUTO -D nvidia_smi=OFF)
  expect("AUTO without a driver" NOT asked AND status EQUAL 0 AND said MATCHES "no driver of a GPU found")
endif()
