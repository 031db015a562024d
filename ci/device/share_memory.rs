//! What eight consumers with copy-on-write views need of the memory that eight copies of the frames would.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dmaflow::frame::{CowView, Frame, ViewPages};
use dmaflow::memory::page_size;
use dmaflow::share::{Receiver, ServerRequest};
use dmaflow::v4l2::{CameraRequest, RateRequest};
use nix::sys::signal::{Signal, raise};
use nix::unistd::Pid;

use crate::camera::request;
use crate::capture::picture;
use crate::harness::{Outcome, PASSED, Test, note};
use crate::process::{Running, start};
use crate::share_many::CONSUMER;
use crate::shared::Shared;

const VIEWS: &str = "share::memory_of_views";

pub const TESTS: &[Test] = &[Test { name: VIEWS, needs: &["vivid"], seconds: 240, run: memory_of_views }];

const CONSUMERS: usize = 8;
const SIZE: (u32, u32) = (1920, 1080);
const ROW: usize = 1920 * 4;
const BUFFERS: usize = 8;
/// Frames that a consumer has at a time, all that it may.
const BUDGET: usize = 2;
/// For the process of a consumer that copies.
const COPIES: &str = "DMAFLOW_TEST_COPIES";
/// At least so much less, in percent.
const LESS: u64 = 65;

/// The proportional set size of all processes and the camera's buffers, against what processes take that copy as many frames as the camera
/// has buffers.
fn memory_of_views() -> Result<Outcome> {
    if let Ok(at) = std::env::var(CONSUMER) {
        return if std::env::var_os(COPIES).is_some() { copy(&at) } else { view(&at) };
    }
    let with_views = measure(false)?;
    let with_copies = measure(true)?;
    // What is mapped of the camera's buffers is in the set sizes as well; whether it is depends on the driver, so they are added whole.
    // Of those that copy, their copies alone are counted, and neither server nor camera.
    let (views, copies) = (with_views.pss + with_views.server + with_views.buffers, with_copies.anonymous);
    note(&format!(
        "in KiB, {CONSUMERS} consumers with views of {BUDGET} frames each, all that they may have: {with_views:?}; {CONSUMERS} with copies of \
         {BUFFERS} frames each, as many as the camera's queue has: {with_copies:?}; {views} against {copies}"
    ));
    ensure!(copies >= (CONSUMERS * BUFFERS * ROW * 1080 / 1024) as u64, "the copies are not there: {copies} KiB");
    ensure!(views * 100 <= copies * (100 - LESS), "{views} KiB are not {LESS} % less than {copies} KiB");
    PASSED
}

/// In KiB.
#[derive(Debug)]
struct Memory {
    /// Of all consumers.
    pss: u64,
    /// Of which no file or device is behind.
    anonymous: u64,
    server: u64,
    buffers: u64,
}

fn measure(copies: bool) -> Result<Memory> {
    let at = "/tmp/dmaflow-share-memory.sock";
    // Nobody is to lose what it has while this is measured.
    let lease = Some(Duration::from_secs(60));
    let server = ServerRequest { budget: BUDGET as u32, lease, ..ServerRequest::default() };
    let rate = RateRequest::Exactly(5.0);
    let camera = CameraRequest { rate, buffers: Some(BUFFERS as u32), ..request("XR24", SIZE) };
    let mut shared = Shared::new(at, server, &camera)?;
    let mut running = Vec::new();
    for _ in 0..CONSUMERS {
        let mut consumer = Command::new(std::env::current_exe()?);
        consumer.args(["--run-one", VIEWS]).env(CONSUMER, at);
        if copies {
            consumer.env(COPIES, "1");
        }
        running.push(start(&mut consumer)?);
        shared.wait_for(running.len())?;
    }
    // Fewer frames than buffers where all may be kept.
    let frames = if copies { 400 } else { BUFFERS as u64 - 2 };
    let pids: Vec<Pid> = running.iter().map(Running::pid).collect();
    shared.flow(frames, |_| Ok(!pids.iter().all(|&pid| is_stopped(pid))))?;
    for consumer in &mut running {
        consumer.wait_until("to hold frames", is_stopped)?;
    }
    let buffers = shared.bytes() as u64 / 1024;
    let mut memory = Memory { pss: 0, anonymous: 0, server: set_size("self", "Pss:")?, buffers };
    for pid in &pids {
        memory.pss += set_size(&pid.to_string(), "Pss:")?;
        memory.anonymous += set_size(&pid.to_string(), "Pss_Anon:")?;
    }
    for consumer in &running {
        consumer.signal(Signal::SIGCONT)?;
    }
    for consumer in running {
        consumer.end()?.has_status(0)?;
    }
    Ok(memory)
}

pub fn is_stopped(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
}

/// In KiB, as the kernel has added it up.
fn set_size(process: &str, what: &str) -> Result<u64> {
    let all = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    let line = all.lines().find_map(|line| line.strip_prefix(what)).context("no such size")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn next(receiver: &mut Receiver) -> Result<Frame> {
    receiver.next_within(Duration::from_secs(100))?.context("no frame came")
}

/// A consumer that has views of all frames that it may have, and writes into one of a hundred pages of each.
fn view(at: &str) -> Result<Outcome> {
    let mut receiver = Receiver::connect(at, "viewer")?;
    let pages = (ROW * 1080).div_ceil(page_size());
    let written = pages.div_ceil(100);
    let mut views: Vec<CowView> = Vec::new();
    while views.len() < BUDGET {
        let mut view = next(&mut receiver)?.view("viewer")?;
        for number in 0..written {
            let at = number * 100 * page_size();
            view.write(0, (at / ROW) as u32, (at % ROW) as u32, &[0xa5])?;
        }
        views.push(view);
    }
    // Measured here.
    raise(Signal::SIGSTOP)?;
    for view in &views {
        view.check()?;
        let copied = view.copied_pages()?;
        ensure!(view.pages() == ViewPages::Device && copied == written as u64, "{view:?}: {copied} of {written} pages");
    }
    PASSED
}

/// A consumer that copies each frame, and has as many copies as the camera has buffers.
fn copy(at: &str) -> Result<Outcome> {
    let mut receiver = Receiver::connect(at, "copier")?;
    let mut copies = Vec::new();
    while copies.len() < BUFFERS {
        let mut copy = picture(&next(&mut receiver)?)?;
        copy.shrink_to_fit();
        copies.push(copy);
    }
    raise(Signal::SIGSTOP)?;
    ensure!(copies.iter().all(|copy| copy.len() == ROW * 1080), "a copy is not whole");
    PASSED
}
