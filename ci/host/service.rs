//! A server and who looks after it: what is listed, what a service manager passes on, what is said of who is disconnected.

use super::*;

#[test]
fn shares_of_this_user_are_listed() {
    let folder = Folder::new("list");
    std::fs::create_dir(folder.join("dmaflow")).unwrap();
    let at = folder.join("dmaflow/cam.sock");
    let server = Process::start(&format!("share --from pattern --size 64x48 --fps 25 --at {at}"));
    drop(connect(&at));
    // Of one that was killed, and no socket at all.
    drop(std::os::unix::net::UnixListener::bind(folder.join("dmaflow/old.sock")).unwrap());
    std::fs::write(folder.join("dmaflow/notes"), "").unwrap();
    // Where a service manager listens, who connects starts the service.
    let (service, activated) = listener(&folder.join("dmaflow/service.sock"));
    let list = |option: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dmaflow"));
        command
            .arg("list")
            .args(option.split_whitespace())
            .env("XDG_RUNTIME_DIR", &folder.0);
        // It ends whoever is listed: that is waited for with a bound.
        let output = output_of(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let listing: serde_json::Value = serde_json::from_str(&list("--json")).unwrap();
    let shares = listing["shares"].as_array().unwrap();
    assert_eq!((shares.len(), &shares[0]["name"]), (3, &format!("unix:{at}").into()), "{listing}");
    assert_eq!((&shares[0]["source"], &shares[0]["fps"]), (&"pattern".into(), &25.0.into()), "{listing}");
    assert!(shares[1]["why_not"].as_str().unwrap().contains("start a server"), "{listing}");
    assert!(shares[2]["not_asked"].as_str().unwrap().contains("starts"), "{listing}");
    // One that is stopped is not waited for: why it is not known is said, and the others are listed.
    server.signal(Signal::SIGSTOP);
    let stopped: serde_json::Value = serde_json::from_str(&list("--json")).unwrap();
    assert!(stopped["shares"][0]["why_not"].is_string(), "{stopped}");
    assert_eq!(stopped["shares"].as_array().unwrap()[1..], shares[1..], "{stopped}");
    server.signal(Signal::SIGCONT);
    assert!(!activated(), "the service was started");
    drop(service);
    let table = list("");
    assert!(table.contains(&format!("unix:{at}  pattern: XR24 64x48")), "{table}");
}

/// A socket that listens, as a service manager makes it, and a way to see whether somebody has connected.
fn listener(at: &str) -> (std::os::fd::OwnedFd, impl Fn() -> bool + use<>) {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    use std::os::fd::AsRawFd;

    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(at).unwrap()).unwrap();
    listen(&fd, Backlog::MAXCONN).unwrap();
    let watched = fd.try_clone().unwrap();
    (fd, move || poll(&mut [PollFd::new(watched.as_fd(), PollFlags::POLLIN)], 0u16).unwrap() == 1)
}

/// Who is disconnected is told of when it happens, and who just leaves is not.
#[test]
fn a_server_says_whom_it_disconnects() {
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, send, socket};
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsRawFd;

    let at = socket_at("tells");
    let mut server = Process::start(&format!("share --from pattern --size 64x48 --fps 25 --at {at}"));
    drop(super::connect(&at));
    let stranger = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
    connect(stranger.as_raw_fd(), &UnixAddr::new(&*at).unwrap()).unwrap();
    send(stranger.as_raw_fd(), b"GET / HTTP/1.1", MsgFlags::empty()).unwrap();
    let said = BufReader::new(server.0.as_mut().unwrap().stderr.take().unwrap());
    // While it runs: the lines end when it does.
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || said.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
    let mut line = told.recv_timeout(PATIENCE).unwrap();
    if line.contains("sharing at") {
        line = told.recv_timeout(PATIENCE).unwrap();
    }
    let expected = format!("disconnected: a connection (process {}", std::process::id());
    assert!(line.contains(&expected) && line.contains("does not begin with"), "{line}");
    let mut receiver = super::connect(&at);
    next(&mut receiver).unwrap();
}

/// As systemd does it: the socket is there before the server, and stays after it; who connects first waits for it.
#[test]
fn a_socket_is_passed_on_by_a_service_manager() {
    use std::os::fd::AsRawFd;

    let at = socket_at("passed");
    let (fd, _) = listener(&at);
    let early = {
        let at = at.to_string();
        std::thread::spawn(move || Receiver::connect(&at, "early"))
    };
    let start = |options: &str, variables: &str| {
        let line = format!(
            "exec 3<&{}; {variables} exec {} share --from pattern --size 64x48 --fps 25 --json {options}",
            fd.as_raw_fd(),
            env!("CARGO_BIN_EXE_dmaflow")
        );
        let mut command = Command::new("bash");
        command.args(["-c", &line]).stdout(Stdio::piped()).stderr(Stdio::piped());
        Process(Some(command.spawn().unwrap()))
    };
    for (options, variables, status) in [
        ("", "LISTEN_PID=1 LISTEN_FDS=1", 2),
        ("", "LISTEN_PID=$$ LISTEN_FDS=2", 2),
        ("--mode 666", "LISTEN_PID=$$ LISTEN_FDS=1", 2),
    ] {
        assert_eq!(start(options, variables).finish().status.code(), Some(status), "{options} {variables}");
    }
    let server = start("", "LISTEN_PID=$$ LISTEN_FDS=1");
    let mut receiver = early.join().unwrap().unwrap();
    drop(next(&mut receiver).unwrap());
    server.signal(Signal::SIGINT);
    assert_eq!(server.json()["at"], format!("unix:{at}"));
    assert!(PathBuf::from(&*at).exists(), "it is the manager's");
}
