//! A consumer that is killed with all that it may have.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dmaflow::share::{Receiver, ServerRequest};
use dmaflow::v4l2::{CameraRequest, RateRequest};
use nix::sys::signal::{Signal, raise};

use crate::camera::request;
use crate::harness::{Outcome, PASSED, Test, note};
use crate::process::start;
use crate::share_many::CONSUMER;
use crate::share_memory::is_stopped;
use crate::shared::Shared;

const KILLED: &str = "share::killed_holder";

pub const TESTS: &[Test] = &[Test { name: KILLED, needs: &["vivid"], seconds: 120, run: killed_holder }];

/// All that the camera has, and all that a consumer may have.
const BUFFERS: usize = 4;
/// So long that nothing is taken back for being late: what comes back comes by the hang-up.
const LEASE: Duration = Duration::from_secs(60);
/// Much shorter than the lease, and longer than any host stalls.
const SOON: Duration = Duration::from_secs(20);

/// It holds every buffer of the camera, which stands still; with its death all are the driver's again, and frames come.
fn killed_holder() -> Result<Outcome> {
    if let Ok(at) = std::env::var(CONSUMER) {
        return hold(&at);
    }
    let at = "/tmp/dmaflow-share-killed.sock";
    let server = ServerRequest { budget: BUFFERS as u32, lease: Some(LEASE), ..ServerRequest::default() };
    let rate = RateRequest::Exactly(30.0);
    let camera = CameraRequest { rate, buffers: Some(BUFFERS as u32), ..request("XR24", (320, 180)) };
    let mut shared = Shared::new(at, server, &camera)?;
    let mut holder = Command::new(std::env::current_exe()?);
    let holder = start(holder.args(["--run-one", KILLED]).env(CONSUMER, at))?;
    shared.wait_for(1)?;
    shared.start()?;
    ensure!(shared.queued()? == BUFFERS, "{} of {BUFFERS} are queued at the start", shared.queued()?);
    let (began, mut presented) = (Instant::now(), 0);
    while !(is_stopped(holder.pid()) && shared.starves()?) {
        ensure!(began.elapsed() < SOON, "after {presented} frames {} buffers are queued", shared.queued()?);
        if let Some(Some(frame)) = shared.turn(20)? {
            shared.present(frame)?;
            presented += 1;
        }
    }
    // None comes back by itself, nor does the driver have any.
    for _ in 0..10 {
        ensure!(shared.turn(50)?.flatten().is_none() && shared.starves()?, "a frame came while all were held");
    }
    ensure!(shared.queued()? == 0 && shared.gone().is_empty(), "{} are queued", shared.queued()?);

    holder.signal(Signal::SIGKILL)?;
    let killed = Instant::now();
    // Taken out of the queue as soon as they are filled, they would not be seen in it: nobody fetches any meanwhile.
    while shared.gone().is_empty() {
        ensure!(killed.elapsed() < SOON, "it has not gone for {SOON:?}");
        shared.dispatch(50)?;
    }
    let after = killed.elapsed();
    ensure!(!shared.starves()? && shared.queued()? == BUFFERS, "{} of {BUFFERS} came back", shared.queued()?);
    let why = shared.gone()[0].why.clone();
    // With the first frame what was lost until now is counted, and nothing more is.
    let mut lost = None;
    for frame in 0..30 {
        let next = loop {
            ensure!(killed.elapsed() < SOON, "{frame} frames came");
            if let Some(Some(frame)) = shared.turn(50)? {
                break frame;
            }
        };
        let starved = shared.counts().starved;
        ensure!(
            *lost.get_or_insert(starved) == starved,
            "frame {frame} after its death: {starved} lost for want of a buffer"
        );
        shared.present(next)?;
        ensure!(!shared.starves()?, "no buffer at frame {frame} after its death");
    }
    note(&format!(
        "it held {BUFFERS} of {BUFFERS} buffers, {} frames were lost by that; all were queued {} ms after the signal ({why})",
        lost.context("no frame")?,
        after.as_millis()
    ));
    drop(holder);
    PASSED
}

/// A consumer that takes all that it may, half of it to look at and half as views, and keeps it.
fn hold(at: &str) -> Result<Outcome> {
    let mut receiver = Receiver::connect(at, "holder")?;
    let (mut frames, mut views) = (Vec::new(), Vec::new());
    for number in 0..BUFFERS {
        let frame = receiver.next_within(Duration::from_secs(100))?.context("no frame came")?;
        if number % 2 == 0 {
            frames.push(frame);
        } else {
            let mut view = frame.view("holder")?;
            view.write(0, 0, 0, &[0xa5])?;
            views.push(view);
        }
    }
    // It is killed here.
    raise(Signal::SIGSTOP)?;
    anyhow::bail!("it goes on with {} frames and {} views", frames.len(), views.len())
}
