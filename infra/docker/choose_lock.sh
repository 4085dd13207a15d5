#!/bin/sh
# The lines of a lock that an image needs: choose_lock.sh cuda|cpu CPU_INDEX requirements.lock
set -eu

case "$1" in
    cuda) cat "$3" ;;
    cpu)
        if [ -z "$2" ]; then
            echo "ACCELERATOR=cpu needs CPU_INDEX, the index where torch's CPU wheels are" >&2
            exit 2
        fi
        # There, torch==2.14.1 is 2.14.1+cpu, which pip takes for the newer one.
        echo "--extra-index-url $2"
        grep -Ev '^(nvidia-|cuda-|triton==)' "$3"
        ;;
    *)
        echo "ACCELERATOR is cuda or cpu, not $1" >&2
        exit 2
        ;;
esac
