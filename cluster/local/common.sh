# Sourced by the local scripts.
# shellcheck shell=bash
source cluster/environment.sh
export RAY_COLOR_PREFIX=0
# Ray replaces 127.0.0.1 by an address that other machines can reach, except where it thinks there are no others.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
