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
mod convert;
mod cow;
mod crc;
mod cycles;
mod display;
mod driver;
mod faults;
mod fences;
mod fences_failed;
mod fences_faults;
mod fences_flow;
mod fences_late;
mod fences_recovery;
mod fences_shown;
mod formats;
#[cfg(feature = "gbm")]
mod gbm;
mod gone;
mod gpu;
mod gpu_made;
mod gpu_program;
mod gpu_sync;
mod growth;
mod harness;
mod inputs;
mod ladder;
mod modules;
mod moves;
mod nonblocking;
mod outputs;
mod picture;
mod probe;
mod process;
mod screen;
mod share;
mod share_fences;
mod share_follow;
mod share_killed;
mod share_many;
mod share_memory;
mod share_users;
mod shared;
mod signals;
mod sinks;
mod snap;
mod streams;
mod sw_sync;
mod syscalls;
mod verify;
mod vgem;
mod vulkan;
mod wgpu;

fn main() -> std::process::ExitCode {
    // Cheap and telling first; what takes minutes last.
    let tests = [
        camera::TESTS,
        inputs::TESTS,
        streams::TESTS,
        capture::TESTS,
        cow::TESTS,
        fences::TESTS,
        display::TESTS,
        nonblocking::TESTS,
        fences_shown::TESTS,
        fences_late::TESTS,
        fences_flow::TESTS,
        fences_recovery::TESTS,
        fences_failed::TESTS,
        fences_faults::TESTS,
        screen::TESTS,
        commands::TESTS,
        sinks::TESTS,
        share::TESTS,
        share_users::TESTS,
        share_killed::TESTS,
        share_follow::TESTS,
        share_fences::TESTS,
        share_many::TESTS,
        share_memory::TESTS,
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
        vulkan::TESTS,
        gpu::TESTS,
        wgpu::TESTS,
        gpu_sync::TESTS,
        gpu_made::TESTS,
        gpu_program::TESTS,
        convert::TESTS,
        cycles::TESTS,
    ];
    harness::main(&tests.concat())
}
