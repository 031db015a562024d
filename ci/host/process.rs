//! Processes and folders of tests, which end with them.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A server, ended with its test.
pub struct Process(pub Option<Child>);

impl Process {
    pub fn start(line: &str) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dmaflow"));
        command
            .args(line.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Process(Some(command.spawn().unwrap()))
    }

    pub fn signal(&self, signal: Signal) {
        let child = self.0.as_ref().unwrap();
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
    }

    pub fn finish(mut self) -> Output {
        output_of(self.0.take().unwrap())
    }

    /// Its result, if it did what it was told.
    pub fn json(self) -> serde_json::Value {
        let output = self.finish();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// No process here takes as long, be the machine as busy as it likes: what takes longer waits for ever.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What a process that is to end has said; one that does not is killed, so that nobody waits for what it says.
pub fn output_of(mut child: Child) -> Output {
    let (stdout, stderr) = (read_all(child.stdout.take()), read_all(child.stderr.take()));
    let end = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() > end {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let (stdout, stderr) = (stdout.join().unwrap(), stderr.join().unwrap());
    let said = || format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    let status = status.unwrap_or_else(|| panic!("it does not end; it has said: {}", said()));
    Output { status, stdout, stderr }
}

/// All that comes until it is closed, read while it comes.
pub fn read_all(from: Option<impl std::io::Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            from.read_to_end(&mut bytes).unwrap();
        }
        bytes
    })
}

/// A folder of one test's own, which goes with it, however that ends. To be made before the processes that use it.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(test: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("dmaflow-host-{test}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn join(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Where a test's server listens, in a folder of its own.
pub struct At {
    path: String,
    _folder: Folder,
}

impl std::ops::Deref for At {
    type Target = str;

    fn deref(&self) -> &str {
        &self.path
    }
}

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.path)
    }
}

pub fn socket_at(test: &str) -> At {
    let folder = Folder::new(test);
    At { path: folder.join("cam.sock"), _folder: folder }
}
