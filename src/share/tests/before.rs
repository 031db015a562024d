//! What comes from a server, where it is used for longer or for other things than its next frame.

use super::*;

/// A view of a frame of before that is detached after a change of the format counts in the account that began with that, also when nothing
/// is left of those frames; what was copied before it was asked for before.
#[test]
fn copies_for_views_of_before_are_not_forgotten() {
    let mut source = pattern(50.0, 4);
    let request = ServerRequest { budget: 3, lease: Some(Duration::from_secs(2)), ..two() };
    let mut server = serve("old-views", request, &source);
    let mut receiver = connect(&mut server, "old-views").unwrap();
    source.start().unwrap();
    let mut view = || {
        drop(present(&mut source, &mut server));
        let frame = receiver.try_next(Ready::FRAME).unwrap().unwrap();
        (frame.view("tester").unwrap(), frame)
    };
    let (early, frame) = view();
    let late = view().0;
    early.detach().unwrap();
    drop(frame);
    let count = |receiver: &Receiver| receiver.copies().iter().map(|copies| copies.count).sum::<u64>();
    receiver.recycle().unwrap();
    let bytes = receiver.copies()[0].bytes;
    assert!(count(&receiver) == 1 && bytes >= source.layout().memory_len(0) as u64, "{:?}", receiver.copies());
    let request =
        PatternRequest { size: (320, 240), rate: 50.0, allocator: Some(Allocator::Plain), ..PatternRequest::default() };
    let mut other = Pattern::new(&request).unwrap();
    server.join(other.layout(), other.rate(), other.buffers()).unwrap();
    other.start().unwrap();
    drop(present(&mut other, &mut server));
    assert_eq!(receiver.try_next(Ready::FRAME).unwrap_err().kind(), Kind::FormatChanged);
    assert_eq!((late.pages(), count(&receiver)), (ViewPages::Device, 1), "too slow for this test");
    receiver.follow().unwrap();
    assert_eq!(count(&receiver), 0, "it was in the account of before");
    let end = Instant::now() + Duration::from_secs(20);
    while late.pages() == ViewPages::Device && Instant::now() < end {
        receiver.recycle().unwrap();
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!((count(&receiver), receiver.copies()[0].bytes), (1, bytes));
    // The rest of those frames is dropped.
    drop((early, late));
    receiver.recycle().unwrap();
    assert_eq!((count(&receiver), receiver.copies()[0].bytes), (1, bytes));
    // And the next account has nothing of it.
    server.join(source.layout(), source.rate(), source.buffers()).unwrap();
    source.recycle().unwrap();
    drop(present(&mut source, &mut server));
    let changed = (0..3).find_map(|_| receiver.try_next(Ready::FRAME).map(drop).err()).unwrap();
    assert_eq!(changed.kind(), Kind::FormatChanged);
    receiver.follow().unwrap();
    assert_eq!(receiver.copies(), []);
}

/// What is shared is not shared on: the first server may take frames back, and nobody would tell the consumers of the second.
#[test]
fn what_is_lent_is_not_shared_on() {
    use crate::endpoint::JoinError;
    let source = pattern(200.0, 3);
    let mut server = serve("lent", two(), &source);
    let receiver = connect(&mut server, "lent").unwrap();
    assert!(source.buffers().iter().all(|buffer| !buffer.is_lent()));
    assert!(receiver.buffers().iter().all(crate::frame::Buffer::is_lent));
    let mut second = Server::bind(&name("lent-on"), two()).unwrap();
    let Err(JoinError::Refused(refusal)) = second.join(receiver.layout(), None, receiver.buffers()) else {
        unreachable!("it was shared on")
    };
    assert!(refusal.repair.contains("connect to the first server itself"), "{refusal}");
    // It takes others still.
    second.join(source.layout(), None, source.buffers()).unwrap();
}
