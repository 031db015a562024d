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

/// Where `list` looks, a share makes the folder, for this user alone; and the help says where that is, and what the columns are.
#[test]
fn the_folder_that_is_listed_is_made() {
    use std::os::unix::fs::PermissionsExt;

    let runtime = std::env::temp_dir().join(format!("dmaflow-folder-{}", std::process::id()));
    std::fs::create_dir_all(&runtime).unwrap();
    let dmaflow = |line: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dmaflow"));
        command.args(line.split(' ')).env("XDG_RUNTIME_DIR", &runtime);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let (folder, elsewhere) = (runtime.join("dmaflow"), runtime.join("other/cam.sock"));
    let failed = dmaflow(&format!("share --from pattern --at {}", elsewhere.display()))
        .output()
        .unwrap();
    assert!(failed.status.code() == Some(1) && !folder.exists() && !runtime.join("other").exists());
    let at = folder.join("cam.sock").to_str().unwrap().to_owned();
    // Also where it is there already.
    for _ in 0..2 {
        let server = Process(Some(dmaflow(&format!("share --from pattern --at {at} --json")).spawn().unwrap()));
        drop(connect(&at));
        assert_eq!(folder.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        let listed = String::from_utf8(dmaflow("list").output().unwrap().stdout).unwrap();
        assert!(listed.contains(&format!("unix:{at}  pattern: ")), "{listed}");
        server.signal(Signal::SIGINT);
        server.json();
    }
    std::fs::remove_dir_all(&runtime).unwrap();
    let help =
        |command: &str| String::from_utf8(dmaflow(&format!("{command} --help")).output().unwrap().stdout).unwrap();
    for command in ["share", "list"] {
        assert!(help(command).contains("$XDG_RUNTIME_DIR/dmaflow/"), "{}", help(command));
    }
    for column in ["PID", "NAME", "UID", "FRAMES", "SKIPPED", "LEASES", "LATENCY", "STOLEN"] {
        let explained = |line: &str| line.trim_start().starts_with(&format!("{column} "));
        assert!(help("share").lines().any(explained), "{column}: {}", help("share"));
    }
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

/// A unit's settings, by section and name.
fn unit(name: &str) -> HashMap<(String, String), String> {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tools/systemd")
        .join(name);
    let (mut section, mut settings) = (String::new(), HashMap::new());
    for line in std::fs::read_to_string(file)
        .unwrap()
        .lines()
        .filter(|line| !line.starts_with('#'))
    {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = name.to_owned();
        } else if let Some((name, value)) = line.split_once('=') {
            let before = settings.insert((section.clone(), name.to_owned()), value.to_owned());
            assert!(before.is_none() && !section.is_empty(), "{line}");
        } else {
            assert!(line.is_empty(), "{line}");
        }
    }
    settings
}

/// The units run what is installed, with options that there are, at a socket that `list` shows.
#[test]
fn the_units_fit_the_program() {
    let get = |unit: &HashMap<_, String>, section: &str, name: &str| {
        let value = unit.get(&(section.to_owned(), name.to_owned()));
        value.unwrap_or_else(|| panic!("{section} has no {name}")).clone()
    };
    let (service, socket) = (unit("dmaflow-share.service"), unit("dmaflow-share.socket"));
    let line = get(&service, "Service", "ExecStart");
    let (program, options) = line.split_once(' ').unwrap();
    // systemd takes no other (systemd.service(5)).
    let home = program
        .strip_prefix("%h/")
        .map(|rest| std::path::Path::new("/home/user").join(rest));
    let path = home.unwrap_or_else(|| PathBuf::from(program));
    assert!(path.is_absolute() && path.ends_with(".cargo/bin/dmaflow"), "{line}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_dmaflow"));
    let output = command
        .args(options.split_whitespace())
        .env_remove("LISTEN_PID")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("unless systemd passes a socket"), "{said}");
    // A camera that is away is waited for.
    let [restart, pause] = ["Restart", "RestartSec"].map(|name| get(&service, "Service", name));
    assert_eq!((restart.as_str(), pause.as_str()), ("on-failure", "2"));
    assert_eq!(get(&service, "Unit", "StartLimitIntervalSec"), "0");
    assert_eq!(get(&service, "Unit", "Requires"), "dmaflow-share.socket");
    let place = get(&socket, "Socket", "ListenSequentialPacket");
    let runtime = std::env::temp_dir().join(format!("dmaflow-units-{}", std::process::id()));
    let at = place.replace("%t", runtime.to_str().unwrap());
    std::fs::create_dir_all(std::path::Path::new(&at).parent().unwrap()).unwrap();
    let (_service, activated) = listener(&at);
    let mut command = Command::new(env!("CARGO_BIN_EXE_dmaflow"));
    let output = command
        .args(["list", "--json"])
        .env("XDG_RUNTIME_DIR", &runtime)
        .output()
        .unwrap();
    let listing: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(listing["shares"][0]["name"], format!("unix:{at}"), "{listing}");
    assert!(listing["shares"][0]["not_asked"].is_string() && !activated(), "{listing}");
    std::fs::remove_dir_all(runtime).unwrap();
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
