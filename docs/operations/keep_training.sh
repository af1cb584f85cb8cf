#!/bin/bash
# Restarts a run after a crash, until it is done. Change the options, or add them behind, then, in the
# folder of the program and inside of tmux or screen:
#   bash docs/operations/keep_training.sh
# Ctrl-C saves, and ends both the program and this script.

MOST_FAILURES=${MOST_FAILURES:-5} # in a row
PAUSE=${PAUSE:-60}                # seconds before a restart
LONG=${LONG:-3600}                # after so many seconds, a run had success: failures count anew

failures=0
while true; do
    started=$SECONDS
    python run_experiment.py --preset 18b --device cuda --save_dir runs/18b --resume latest "$@"
    code=$?
    case $code in
    0) exit 0 ;;                                 # done
    2 | 3) exit "$code" ;;                       # wrong options, or diverged: it would end so again
    129 | 130 | 138 | 143) exit "$code" ;;       # stopped by a signal, and saved
    esac
    if ((SECONDS - started >= LONG)); then
        failures=0
    fi
    failures=$((failures + 1))
    if ((failures >= MOST_FAILURES)); then
        echo "The program failed $failures times in a row: that is enough."
        exit "$code"
    fi
    echo "The program ended with exit code $code. It starts again in $PAUSE seconds."
    sleep "$PAUSE"
done
