//! Tests on devices: vivid as the camera, vkms as the display. Build them with
//! `cargo test --release --no-run --test device` and run the program as root where those modules are loaded (in the virtual
//! machine: `tools/vm/run -- target/release/deps/device-…`). `--help` tells the rest.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a panic in a test is a failure of that test, and a test program's output is its stdout"
)]

mod alloc;
mod bufs;
mod camera;
mod capture;
mod causes;
#[path = "../host/chaos.rs"]
mod chaos;
mod commands;
mod cow;
mod cycles;
mod display;
mod faults;
mod formats;
#[cfg(feature = "gbm")]
mod gbm;
mod gone;
mod harness;
mod inputs;
mod ladder;
mod modules;
mod moves;
mod nonblocking;
mod outputs;
mod probe;
mod process;
mod screen;
mod share;
mod signals;
mod sinks;
mod snap;
mod streams;
mod syscalls;
mod verify;

fn main() -> std::process::ExitCode {
    // Cheap and telling first; what takes minutes last.
    let tests = [
        camera::TESTS,
        inputs::TESTS,
        streams::TESTS,
        capture::TESTS,
        cow::TESTS,
        display::TESTS,
        nonblocking::TESTS,
        screen::TESTS,
        commands::TESTS,
        sinks::TESTS,
        share::TESTS,
        outputs::TESTS,
        snap::TESTS,
        bufs::TESTS,
        #[cfg(feature = "gbm")]
        gbm::TESTS,
        probe::TESTS,
        verify::TESTS,
        faults::TESTS,
        gone::TESTS,
        causes::TESTS,
        alloc::TESTS,
        syscalls::TESTS,
        formats::TESTS,
        ladder::TESTS,
        moves::TESTS,
        signals::TESTS,
        cycles::TESTS,
    ];
    harness::main(&tests.concat())
}
