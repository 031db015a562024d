//! `examples/consume.c`, a consumer that knows the protocol by its documentation alone.

use super::*;

/// The program in C, compiled for this test.
fn consume_c(folder: &Folder) -> String {
    let program = folder.join("consume");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/consume.c");
    let compiled = Command::new("cc")
        .args(["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .arg(source)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    program
}

fn start(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// 64-bit FNV-1a.
fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum: u64, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// A program in another language, that has nothing but the protocol's documentation, sees the same.
#[test]
fn a_program_in_c_speaks_the_protocol() {
    let folder = Folder::new("c-speaks-program");
    let program = consume_c(&folder);
    let at = socket_at("c");
    let server = Process::start(&format!("share --from pattern --size 64x48 --fps 25 --at {at} --json"));
    let mut receiver = connect(&at);
    let run = |frames: &str| {
        let output = output_of(start(Command::new(&program).args([&*at, frames])));
        let (stdout, stderr) =
            (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr).into_owned());
        assert!(output.status.success(), "{stderr}\n{stdout}");
        stdout
    };
    let (said, expected) = (run("40"), expected(400));
    assert!(said.contains("welcome: 2 frames at a time, of pattern\n"), "{said}");
    assert!(
        said.contains("8 buffers of 64x48, XR24, each frame for 120000 us\n") && said.contains("writable no\n"),
        "{said}"
    );
    let mut compared = 0;
    for line in said.lines().filter_map(|line| line.strip_prefix("frame ")) {
        let (sequence, sum) = line.split_once(' ').unwrap();
        if let Some(bytes) = expected.get(&sequence.parse().unwrap()) {
            assert_eq!(sum, format!("{:016x}", fnv(bytes)), "{line}");
            compared += 1;
        }
    }
    assert!(compared >= 30, "{said}");
    // It goes when the server does, and is told why.
    let waiting = start(Command::new(&program).arg(&*at));
    for _ in 0..10 {
        drop(next(&mut receiver).unwrap());
    }
    server.signal(Signal::SIGINT);
    let waited = output_of(waiting);
    let last = String::from_utf8_lossy(&waited.stdout);
    assert!(waited.status.success() && last.contains("the server ends: reason 0"), "{last}");
    let report = server.json();
    assert_eq!(
        (&report["gone"][0]["name"], &report["gone"][0]["disconnected"]),
        (&"consume".into(), &serde_json::Value::Null)
    );
    assert_told_latency(&report["gone"][0], 40);
}

/// The same program waits for the fences that frames come with, and sees what was written before they signalled.
#[test]
fn a_program_in_c_waits_for_fences() {
    use dmaflow::endpoint::Sink;
    use dmaflow::fence::SyncFile;
    use dmaflow::share::{Server, ServerRequest};

    let folder = Folder::new("c-fences-program");
    let (program, at) = (consume_c(&folder), socket_at("c-fences"));
    let request = PatternRequest { rate: 50.0, size: (64, 48), ..PatternRequest::default() };
    let mut source = Pattern::new(&request).unwrap();
    let lease = Some(Duration::from_secs(5));
    let mut server = Server::bind(&at, ServerRequest { lease, ..ServerRequest::default() }).unwrap();
    server.join(source.layout(), source.rate(), source.buffers()).unwrap();
    source.start().unwrap();
    let mut child = start(Command::new(&program).args([&*at, "30"]));
    let mut expected = HashMap::new();
    // What a frame is before its fence has signalled, and the end of the pipe that is its fence: open until something is written.
    let mut open: Vec<(Frame, Vec<u8>, std::os::fd::OwnedFd)> = Vec::new();
    let end = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > end {
            // Then what it has said is all that it says.
            child.kill().unwrap();
        }
        server.dispatch().unwrap();
        source.recycle().unwrap();
        std::thread::sleep(Duration::from_millis(1));
        let Some(frame) = source.try_next(Ready::FRAME).unwrap() else { continue };
        for (frame, bytes, end) in open.drain(..) {
            fill(&frame, &bytes);
            nix::unistd::write(&end, b"x").unwrap();
        }
        let (sequence, bytes) = (frame.meta().sequence, pixels(&frame));
        expected.insert(sequence, (fnv(&bytes), sequence % 3 != 0));
        if sequence % 3 == 0 {
            server.present(frame).unwrap();
            continue;
        }
        fill(&frame, &vec![0; bytes.len()]);
        let (fence, end) = nix::unistd::pipe().unwrap();
        let frame = frame.with_acquire_fence(SyncFile::from(fence));
        open.push((frame.clone(), bytes, end));
        server.present(frame).unwrap();
    }
    let output = output_of(child);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let (mut fenced, mut frames, mut waited) = (0, 0, None);
    for line in said.lines() {
        match line.split_once(' ') {
            Some(("fenced", sequence)) => waited = Some(sequence.parse::<u32>().unwrap()),
            Some(("frame", rest)) => {
                let (sequence, sum) = rest.split_once(' ').unwrap();
                let sequence = sequence.parse().unwrap();
                let (expected, has_fence) = expected[&sequence];
                assert_eq!((sum, waited == Some(sequence)), (format!("{expected:016x}").as_str(), has_fence), "{line}");
                (frames, fenced) = (frames + 1, fenced + u32::from(has_fence));
            }
            _ => assert!(!line.starts_with("late") && !line.starts_with("lost"), "{said}"),
        }
    }
    assert!(frames == 30 && fenced > 10, "{said}");
}

/// It does not believe a server either: no length that is not there, no memory that could be cut off under it.
#[test]
fn a_program_in_c_checks_what_it_is_told() {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::socket::*;
    use std::io::IoSlice;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    let folder = Folder::new("c-checks-program");
    let program = consume_c(&folder);
    let at = socket_at("c-checks");
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(&*at).unwrap()).unwrap();
    listen(&listener, Backlog::new(1).unwrap()).unwrap();
    let ring = |len, seals| {
        let memfd = memfd_create("test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&memfd, len).unwrap();
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        memfd
    };
    let sealed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    let welcome = b"dmaf\x01\0\x02\0\x02\0\0\0\0\0\0\0\x01\0x";
    let cases: [(&[u8], Option<OwnedFd>, &str); 7] = [
        (b"dmaf\x01\0\x05\0\0\0\xff\xffx", None, "a text has another length"),
        (b"dmaf\x01\0\x05\0\0\0", None, "a text has another length"),
        (b"dmaf\x01\0\x02\0\x02\0\0\0\0\0\0\0\xff\xffx", Some(ring(4096, sealed)), "a text has another length"),
        (welcome, None, "the welcome is not right"),
        (welcome, Some(ring(4096, SealFlag::F_SEAL_GROW)), "the ring is not sealed"),
        (welcome, Some(ring(512, sealed)), "too small"),
        (b"dmaf\x01\0\x03\0", Some(ring(4096, sealed)), "descriptors come with a message that has none"),
    ];
    for (bytes, fd, why) in cases {
        let running = start(Command::new(&program).arg(&*at));
        let connects = poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], 60_000u16);
        assert_eq!(connects.unwrap(), 1, "it does not connect");
        // SAFETY: the kernel has just made it for this process, and nobody else owns it.
        let peer = unsafe { OwnedFd::from_raw_fd(accept(listener.as_raw_fd()).unwrap()) };
        let fds: Vec<_> = fd.iter().flat_map(|fd| [fd.as_raw_fd(); 2]).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<UnixAddr>(peer.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::empty(), None).unwrap();
        let output = output_of(running);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(why), "{why}: {said}");
    }
    // What it says is for a terminal, and nothing else of it gets there.
    let running = start(Command::new(&program).arg(&*at));
    // SAFETY: as above.
    let peer = unsafe { OwnedFd::from_raw_fd(accept(listener.as_raw_fd()).unwrap()) };
    send(peer.as_raw_fd(), b"dmaf\x01\0\x05\0\0\0\x06\0\x1b[2J\xc2\x9b", MsgFlags::empty()).unwrap();
    let said = output_of(running).stdout;
    assert_eq!(String::from_utf8_lossy(&said), "the server ends: reason 0, ?[2J??\n");
}
