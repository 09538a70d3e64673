//! The databases of this server, from the shared catalog: a worker without a database can read it, too.
//! Tables read: pg_database. Inside a transaction; takes AccessShareLock.
use pgrx::pg_sys;

/// A database that sessions may connect to and that is no template.
pub struct Database {
    pub oid: u32,
    pub name: String,
}

/// Ends the scan and closes the catalog on drop; abort does it when an error unwinds.
struct Scan {
    rel: pg_sys::Relation,
    scan: pg_sys::TableScanDesc,
}

impl Drop for Scan {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: both were opened together by `open_to_connections`, and are closed once. The lock goes with the transaction.
            unsafe {
                pg_sys::heap_endscan(self.scan);
                pg_sys::table_close(self.rel, pg_sys::NoLock as pg_sys::LOCKMODE);
            }
        }
    }
}

pub fn open_to_connections() -> Vec<Database> {
    // SAFETY: inside a transaction. May raise: unwinds. Both are closed by `Scan`.
    let scan = unsafe {
        let rel = pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
        Scan { rel, scan: pg_sys::table_beginscan_catalog(rel, 0, core::ptr::null_mut()) }
    };
    let mut found = Vec::new();
    loop {
        super::xact::check_for_interrupts();
        // SAFETY: the scan is open. May raise (I/O): unwinds. The tuple is good until the next call.
        let tuple = unsafe { pg_sys::heap_getnext(scan.scan, pg_sys::ScanDirection::ForwardScanDirection) };
        if tuple.is_null() {
            return found;
        }
        // SAFETY: a tuple of pg_database, whose fixed part has this shape.
        let form = unsafe { &*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>() };
        // A negative limit below -1 marks a database whose DROP was interrupted.
        if form.datallowconn && !form.datistemplate && form.datconnlimit >= -1 {
            found.push(Database { oid: form.oid.into(), name: pgrx::name_data_to_str(&form.datname).to_owned() });
        }
    }
}
